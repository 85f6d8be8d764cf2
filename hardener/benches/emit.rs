//! Where the time of `hardener emit` goes, phase by phase, on Debian's kernels (found as the tests find them).

#![allow(missing_docs, reason = "criterion_group! makes a public function")]

#[path = "../tests/common/mod.rs"]
mod common;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use hardener::emit::{self, kernel_thunks};
use hardener::image::{Image, unpacked};
use hardener::passes::{self, Analyses, Context};
use hardener::recipe::Recipe;
use hardener::text::{self, Sweep, Text};
use hardener::thunks;
use std::hint::black_box;
use std::path::Path;

fn phases(criterion: &mut Criterion, name: &str, path: &Path) {
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10);
    let file = std::fs::read(path).expect("the kernel is readable");
    group.bench_function("1 unpack", |bench| {
        bench.iter_batched(
            || file.clone(),
            |file| unpacked(file).expect("unpacks"),
            BatchSize::LargeInput,
        );
    });
    let elf = unpacked(file).expect("unpacks");
    group.bench_function("2 ELF, relocations, kallsyms, BTF", |bench| {
        bench.iter_batched(
            || elf.clone(),
            |elf| Image::parse(elf).expect("parses"),
            BatchSize::LargeInput,
        );
    });
    let image = Image::parse(elf).expect("parses");
    group.bench_function("3 tables", |bench| {
        bench.iter(|| image.tables().expect("has tables"))
    });
    let tables = image.tables().expect("has tables");
    let text = Text::analyse(&image, &tables).expect("analyses");
    let code = text.span.code.len() as usize;
    group.bench_function("4 sweep", |bench| {
        bench.iter(|| Sweep::run(black_box(&text.bytes[..code]), text.span))
    });
    group.bench_function("5 text (sweep, slots, targets)", |bench| {
        bench.iter(|| Text::analyse(&image, &tables).expect("analyses"));
    });
    group.bench_function("6 run-time model", |bench| {
        bench.iter(|| text::model::build(&image, &tables, text.span).expect("builds"));
    });
    let recipe = Recipe::default();
    let kernel = kernel_thunks(&image).expect("has thunks");
    group.bench_function("7 thunks and tables", |bench| {
        bench.iter(|| {
            thunks::build(&text, &[], &kernel, &recipe, Analyses::default()).expect("fits")
        })
    });
    let cave = thunks::build(&text, &[], &kernel, &recipe, Analyses::default()).expect("fits");
    let context = Context {
        recipe: &recipe,
        analyses: Analyses::default(),
        text: &text,
        cave: &cave,
    };
    group.bench_function("8 passes", |bench| {
        bench.iter(|| {
            passes::VARIANTS.map(|(name, passes)| {
                passes::run(name, passes, &context)
                    .expect("passes fit")
                    .edits
                    .0
                    .len()
            })
        });
    });
    let bundle = emit::emit(path, &Recipe::default(), &mut |_| {}).expect("emits");
    group.bench_function("9 digests and encoding", |bench| {
        bench.iter_batched(
            || bundle.clone(),
            |mut bundle| bundle.seal(),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("whole, without writing", |bench| {
        bench.iter(|| emit::emit(path, &Recipe::default(), &mut |_| {}).expect("emits"));
    });
    group.finish();
}

fn all(criterion: &mut Criterion) {
    phases(criterion, "cloud (lz4)", common::cloud());
    phases(criterion, "amd64 (xz)", common::amd64());
}

criterion_group!(benches, all);
criterion_main!(benches);
