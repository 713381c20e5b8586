//! What README says about its example is true. tests/mirror/hello.rs shows that the example works.

const HELLO: &str = include_str!("../examples/hello.rs");
const README: &str = include_str!("../README.md");

#[test]
fn it_is_readme_s_word_for_word() {
    assert!(README.contains(&format!("```rust,no_run\n{HELLO}```\n")));
}

#[test]
fn it_is_short() {
    assert!(HELLO.lines().count() <= 85);
    assert!(HELLO.lines().all(|line| line.len() <= 120));
}

/// Every line that passthrough adds to a server that keeps its open files in a map is marked.
#[test]
fn passthrough_takes_few_lines() {
    let code = || HELLO.lines().filter(|line| !line.starts_with("//!"));
    let marked: Vec<_> = code().filter(|line| line.contains("//+")).collect();
    assert!(marked.len() <= 15, "{}", marked.len());
    for name in [
        "use fuse_backing",
        "Arc<Handles>",
        "from_bits_retain",
        "negotiate(",
        "add_capabilities",
        "set_max_stack_depth",
        "handles.open",
        "wrap_backing",
        "opened_passthrough",
        "into_raw",
        "on_server_mode",
        "FuseDevice::new",
        "attach",
    ] {
        let of_name = code().filter(|line| line.contains(name) && !line.contains("`attach`"));
        let unmarked: Vec<_> = of_name.filter(|line| !marked.contains(line)).collect();
        assert!(unmarked.is_empty(), "{name}: {unmarked:?}");
        assert!(marked.iter().any(|line| line.contains(name)), "{name}");
    }
    let is_unsafe = code().filter(|line| line.contains("unsafe {"));
    assert!(is_unsafe.clone().all(|line| line.contains("wrap_backing")));
    assert_eq!(is_unsafe.count(), 1);
}

/// No result of the negotiation is ignored.
#[test]
fn no_result_is_thrown_away() {
    let thrown: Vec<_> = HELLO
        .lines()
        .filter(|line| line.contains("let _ ="))
        .collect();
    assert_eq!(thrown.len(), 1, "{thrown:?}");
    assert!(thrown[0].contains("into_raw"));
}
