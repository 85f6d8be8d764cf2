//! A profile of functions: which ones a kernel ran.
//!
//! ```text
//! # a web server, two hours
//! do_sys_poll
//! tcp_v4_rcv
//! 0xffffffff812f3a40
//! ```
//!
//! One function a line, by its symbol or by an address inside it. A symbol that several functions have means all of them.

use super::{Names, Place, lines};
use crate::image::Image;
use penumbra_bundle::LinkVa;

/// Functions that ran.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Functions(Vec<Place>);

impl Functions {
    /// Reads a profile; which line is none, and why.
    pub fn parse(text: &str) -> Result<Functions, String> {
        let mut functions = Vec::new();
        for (number, words) in lines(text) {
            let place = match words[..] {
                [word] => Place::parse(word),
                _ => None,
            };
            functions.push(place.ok_or_else(|| {
                format!("line {number} is no function, as `tcp_v4_rcv` or `0xffffffff812f3a40`")
            })?);
        }
        if functions.is_empty() {
            return Err(
                "no function is in it: every call of the kernel would be stopped".to_owned(),
            );
        }
        Ok(Functions(functions))
    }

    /// Finds them in `image`: an address in each, and how many lines name what this kernel does not have. Modules' functions
    /// are among these.
    pub fn resolve(&self, image: &Image) -> (Vec<LinkVa>, u64) {
        let names = Names::of(image);
        let (mut found, mut unknown) = (Vec::new(), 0);
        for place in &self.0 {
            let own = names.find(place);
            unknown += u64::from(own.is_empty());
            found.extend(own);
        }
        (found, unknown)
    }
}

#[cfg(test)]
mod tests {
    use super::Functions;

    #[test]
    fn profiles_are_merged_by_concatenation() {
        let (one, other) = ("# one\nfirst\n", "\nsecond # hot\n0xffffffff81000010\n");
        let both = Functions::parse(&format!("{one}{other}")).unwrap();
        assert_eq!(both.0.len(), 3);
        assert_eq!(both.0[0], Functions::parse(one).unwrap().0[0]);
    }

    #[test]
    fn what_is_no_function_is_named() {
        for bad in ["a b", "12", "0xzz", "a+12", "+0x1"] {
            let said = Functions::parse(&format!("first\n{bad}\n")).unwrap_err();
            assert!(said.starts_with("line 2 is no function"), "{bad}: {said}");
        }
    }

    #[test]
    fn a_profile_of_nothing_is_refused() {
        assert!(Functions::parse("# nothing\n").is_err());
    }
}
