//! Sets of 64-bit values as disjoint intervals.

use smallvec::{SmallVec, smallvec};

/// One, mostly.
type Spans = SmallVec<[(u64, u64); 1]>;

/// Sorted, disjoint, inclusive intervals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Set(Spans);

impl Set {
    /// Every value.
    pub fn all() -> Set {
        Set(smallvec![(0, u64::MAX)])
    }

    /// No value.
    pub fn none() -> Set {
        Set(Spans::new())
    }

    /// From `low` to `high`, both inside; none when inverted.
    pub fn span(low: u64, high: u64) -> Set {
        if low > high {
            return Set::none();
        }
        Set(smallvec![(low, high)])
    }

    /// From `low` up to `high`, both inside, around the end of the number line when inverted.
    pub fn around(low: u64, high: u64) -> Set {
        if low <= high {
            return Set::span(low, high);
        }
        Set(smallvec![(0, high), (low, u64::MAX)])
    }

    /// Whether no value is inside.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The intervals.
    pub fn spans(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// The least and the greatest value.
    pub fn hull(&self) -> Option<(u64, u64)> {
        Some((self.0.first()?.0, self.0.last()?.1))
    }

    /// Every value that is not inside.
    pub fn complement(&self) -> Set {
        let mut out = Spans::new();
        let mut next = Some(0);
        for &(low, high) in &self.0 {
            if let Some(from) = next
                && from < low
            {
                out.push((from, low - 1));
            }
            next = high.checked_add(1);
        }
        if let Some(from) = next {
            out.push((from, u64::MAX));
        }
        Set(out)
    }

    /// Values in both.
    pub fn intersect(&self, other: &Set) -> Set {
        let mut out = Spans::new();
        for a in &self.0 {
            for b in &other.0 {
                let (low, high) = (a.0.max(b.0), a.1.min(b.1));
                if low <= high {
                    out.push((low, high));
                }
            }
        }
        out.sort_unstable();
        Set(out)
    }

    /// Values in either.
    pub fn union(&self, other: &Set) -> Set {
        self.complement()
            .intersect(&other.complement())
            .complement()
    }

    /// Values in this set and not in `other`.
    pub fn minus(&self, other: &Set) -> Set {
        self.intersect(&other.complement())
    }

    /// The union of what `map` makes of each interval.
    pub fn flat_map(&self, map: impl Fn(u64, u64) -> Set) -> Set {
        self.0
            .iter()
            .fold(Set::none(), |set, (low, high)| set.union(&map(*low, *high)))
    }
}

#[cfg(test)]
mod tests {
    use super::Set;

    #[test]
    fn complement_of_edges() {
        assert_eq!(Set::all().complement(), Set::none());
        assert_eq!(Set::none().complement(), Set::all());
        assert_eq!(Set::span(0, 4).complement(), Set::span(5, u64::MAX));
        assert_eq!(Set::span(3, u64::MAX).complement(), Set::span(0, 2));
    }

    #[test]
    fn wraps_around() {
        let set = Set::around(u64::MAX - 1, 2);
        assert_eq!(set.spans(), [(0, 2), (u64::MAX - 1, u64::MAX)]);
        assert_eq!(set.complement(), Set::span(3, u64::MAX - 2));
    }

    #[test]
    fn union_joins_neighbours() {
        assert_eq!(Set::span(0, 4).union(&Set::span(5, 9)), Set::span(0, 9));
    }
}
