//! A section of thunks under construction, on iced's assembler: it remembers where absolute addresses, return tails and traps
//! stand.

use super::{Named, Violation};
use iced_x86::code_asm::CodeAssembler;
use iced_x86::{BlockEncoderOptions, IcedError};
use penumbra_bundle::{LinkVa, Offending, Trap, VaRange};

/// Thunks start on a cache line's half, as the kernel's own do.
const ALIGN: u64 = 32;
const FILLER: u8 = 0xcc;

/// Thunks, one after another.
pub struct Section {
    start: LinkVa,
    bytes: Vec<u8>,
    named: Vec<Named>,
    relocs: Vec<LinkVa>,
    return_tails: Vec<LinkVa>,
    traps: Vec<Trap>,
}

/// One thunk under construction.
pub struct Thunk {
    /// iced's assembler.
    pub asm: CodeAssembler,
    absolute: Vec<usize>,
    tails: Vec<usize>,
    traps: Vec<(usize, Offending)>,
}

impl Thunk {
    /// Says that the instruction assembled last holds a 32-bit sign-extended absolute address.
    pub fn absolute(&mut self) {
        self.absolute.push(self.asm.instructions().len() - 1);
    }

    /// Ends the thunk by returning as the kernel's return sites do.
    pub fn return_tail(&mut self, return_thunk: LinkVa) -> Result<(), IcedError> {
        self.tails.push(self.asm.instructions().len());
        self.asm.jmp(return_thunk.0)
    }

    /// Says that the instruction assembled next is a trap.
    pub fn trap(&mut self, offending: Offending) {
        self.traps.push((self.asm.instructions().len(), offending));
    }
}

/// An address as the sign-extended 32-bit constant that instructions hold.
pub fn imm32(va: LinkVa) -> i32 {
    // The kernel is linked into the top 2 GiB (-mcmodel=kernel).
    va.0 as u32 as i32
}

impl Section {
    /// An empty section at `start`.
    pub fn new(start: LinkVa) -> Section {
        Section {
            start,
            bytes: Vec::new(),
            named: Vec::new(),
            relocs: Vec::new(),
            return_tails: Vec::new(),
            traps: Vec::new(),
        }
    }

    /// Assembles one thunk, whose traps are for `violation`, and gives its address.
    ///
    /// # Panics
    /// When iced refuses an instruction or a jump's length: a mistake in a thunk's source, not in any input.
    pub fn thunk(
        &mut self,
        name: &str,
        violation: &Violation,
        write: impl FnOnce(&mut Thunk) -> Result<(), IcedError>,
    ) -> LinkVa {
        self.aligned(ALIGN, name, violation, write)
    }

    /// Like [`Section::thunk`], without space before it: for thunks of which there are thousands.
    ///
    /// # Panics
    /// As that.
    pub fn packed(
        &mut self,
        name: &str,
        violation: &Violation,
        write: impl FnOnce(&mut Thunk) -> Result<(), IcedError>,
    ) -> LinkVa {
        self.aligned(1, name, violation, write)
    }

    /// Like [`Section::thunk`]; without a name it is a piece of the thunks that jump there, and no slot may.
    ///
    /// # Panics
    /// As that.
    pub fn thunk_or_piece(
        &mut self,
        name: Option<String>,
        violation: &Violation,
        write: impl FnOnce(&mut Thunk) -> Result<(), IcedError>,
    ) -> LinkVa {
        let at = self.aligned(
            ALIGN,
            name.as_deref().unwrap_or("a piece"),
            violation,
            write,
        );
        if name.is_none() {
            self.named.pop();
        }
        at
    }

    /// A jump without a name and without space before it; its address.
    ///
    /// # Panics
    /// As [`Section::thunk`].
    pub fn packed_jump(&mut self, to: LinkVa, violation: &Violation) -> LinkVa {
        let at = self.aligned(1, "a jump", violation, |thunk| thunk.asm.jmp(to.0));
        self.named.pop();
        at
    }

    /// Where the next packed thunk will stand.
    pub fn end(&self) -> LinkVa {
        LinkVa(self.start.0 + self.bytes.len() as u64)
    }

    fn aligned(
        &mut self,
        align: u64,
        name: &str,
        violation: &Violation,
        write: impl FnOnce(&mut Thunk) -> Result<(), IcedError>,
    ) -> LinkVa {
        let at = (self.start.0 + self.bytes.len() as u64).next_multiple_of(align);
        self.bytes.resize((at - self.start.0) as usize, FILLER);
        let mut thunk = Thunk {
            asm: CodeAssembler::new(64).expect("64 is a bitness"),
            absolute: Vec::new(),
            tails: Vec::new(),
            traps: Vec::new(),
        };
        write(&mut thunk).expect("the thunk's instructions exist");
        let options = BlockEncoderOptions::RETURN_CONSTANT_OFFSETS
            | BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let done = thunk
            .asm
            .assemble_options(at, options)
            .expect("the thunk's branches reach")
            .inner;
        for index in thunk.absolute {
            let constants = done.constant_offsets[index];
            let both = [
                (
                    constants.displacement_offset(),
                    constants.displacement_size(),
                ),
                (constants.immediate_offset(), constants.immediate_size()),
            ];
            // An absolute address has 32 bits; a displacement beside it is the stack's, and short.
            let mut wide = both.iter().filter(|(_, size)| *size == 4);
            let (Some(inside), None) = (wide.next(), wide.next()) else {
                panic!("{name}: one constant of 32 bits expected, {both:?}");
            };
            let start = at + u64::from(done.new_instruction_offsets[index]);
            self.relocs.push(LinkVa(start + inside.0 as u64));
        }
        for index in thunk.tails {
            let tail = done.new_instruction_offsets[index] as usize;
            let next = done.new_instruction_offsets.get(index + 1);
            let next = next.map_or(done.code_buffer.len(), |next| *next as usize);
            assert_eq!(next - tail, 5, "{name}: a return tail is 5 bytes");
            assert_eq!(
                done.code_buffer[tail], 0xe9,
                "{name}: a return tail is a near jump"
            );
            self.return_tails.push(LinkVa(at + tail as u64));
        }
        for (index, offending) in thunk.traps {
            self.traps.push(Trap {
                at: LinkVa(at + u64::from(done.new_instruction_offsets[index])),
                pass: violation.pass.to_owned(),
                offending,
                action: violation.action,
            });
        }
        self.bytes.extend(&done.code_buffer);
        let end = LinkVa(self.start.0 + self.bytes.len() as u64);
        self.named.push(Named {
            name: name.to_owned(),
            range: VaRange {
                start: LinkVa(at),
                end,
            },
        });
        LinkVa(at)
    }

    /// The code so far.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The thunks' symbols.
    pub fn named(&self) -> &[Named] {
        &self.named
    }

    /// Absolute addresses in the code, of 32 bits each.
    pub fn relocs(&self) -> &[LinkVa] {
        &self.relocs
    }

    /// Traps in the code.
    pub fn traps(&self) -> &[Trap] {
        &self.traps
    }

    /// Return tails in the code.
    pub fn return_tails(&self) -> &[LinkVa] {
        &self.return_tails
    }
}
