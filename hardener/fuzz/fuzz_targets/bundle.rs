//! Bundles with sound digests: what is taken is told about without a panic, and seals to files that read back the same.
#![no_main]

use hardener::report;
use hardener_fuzz::files::FILES;
use hardener_fuzz::{memory, parts, seen};
use libfuzzer_sys::fuzz_target;
use penumbra_bundle::{Bundle, MANIFEST};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

fuzz_target!(init: memory(256), |data: &[u8]| {
    let [manifest, rest @ ..]: [&[u8]; FILES.len() + 1] = parts(data);
    let mut manifest = String::from_utf8_lossy(manifest).into_owned();
    let mut files = BTreeMap::new();
    for (name, bytes) in FILES.into_iter().zip(rest) {
        // As one would do who wants the file to be read; seeds have this in place of a digest.
        let digest = Sha256::digest(bytes);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        manifest = manifest.replace(&format!("<{name}>"), &digest);
        files.insert(name.to_owned(), bytes.to_vec());
    }
    files.insert(MANIFEST.to_owned(), manifest.into_bytes());
    let Some(bundle) = seen("the reader", Bundle::from_files(&files)) else {
        return;
    };
    let sealed = bundle.clone().seal();
    let again = Bundle::from_files(&sealed).unwrap_or_else(|error| panic!("sealed: {error}"));
    assert!(again.clone().seal() == sealed);
    assert!(again.text == bundle.text && again.model == bundle.model && again.symbols == bundle.symbols);
    assert!(again.cave == bundle.cave && again.edits == bundle.edits);
    assert!(again.forward == bundle.forward && again.backward == bundle.backward);
    assert!(again.modules == bundle.modules);
    if let Some(figures) = seen("the report", report::report(&bundle)) {
        let _ = (figures.json(), figures.text(), figures.html());
    }
    let at = bundle.manifest.text.start;
    let _ = report::explain(&bundle, &format!("{:#x}", at.0)).map(|place| place.json());
    let _ = report::diff(&bundle, &again).map(|difference| assert!(difference.same()));
});
