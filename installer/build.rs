//! Links the toolstack libraries that xenctrl-sys does not: hypercalls, foreign memory, xenstore.
fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for library in ["xencall", "xenforeignmemory", "xenstore"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
}
