//! The wire format: what can be decoded, and what is rejected.

use super::*;

/// Bytes as the agent's own encoder writes them.
#[rstest]
#[case::empty(&[], "config.image: is required")]
#[case::no_keys(&[0x80], "config.image: is required")]
#[case::null(&[0xc0], "config.image: is required")]
#[case::image_null(b"\x81\xa5image\xc0", "config.image: is required")]
#[case::number_for_text(b"\x81\xa5image\x05", "config.image: a number is not a string")]
#[case::text_for_bool(
    b"\x82\xa4boot\xa4true\xa5image\xa1x",
    "config.boot: a string is not true or false"
)]
#[case::element(
    b"\x82\xa7command\x92\xa1x\x01\xa5image\xa1x",
    "config.command[1]: a number is not a string"
)]
#[case::not_a_list(
    b"\x82\xa7command\xa1x\xa5image\xa1x",
    "config.command: a string is not a list of strings"
)]
#[case::not_a_map(
    b"\x82\xa4bind\x91\xa1x\xa5image\xa1x",
    "config.bind: a string is not a map"
)]
#[case::in_a_map(
    b"\x82\xa4bind\x91\x81\xa1k\x01\xa5image\xa1x",
    r#"config.bind["k"]: a number is not a string"#
)]
#[case::not_a_number(
    b"\x82\xa5image\xa1x\xa8port_map\x91\x81\xa1k\xa1z",
    r#"config.port_map["k"]: "z" is not a number"#
)]
#[case::not_utf8(b"\x81\xa5image\xa1\xff", "config.image: the text is not UTF-8")]
#[case::not_a_block(&[0x05], "config.*: a number is not a block")]
#[case::more(&[0x80, 0x80], "config.*: 1 bytes follow the end of the block")]
fn a_value_of_the_wrong_type_is_refused_by_name(#[case] bytes: &[u8], #[case] message: &str) {
    assert_eq!(TestHost::new().raw(bytes).unwrap_err().to_string(), message);
}

#[test]
fn deep_and_broken_bytes_are_errors() {
    for bytes in [
        vec![0x91; 1_000_000],
        vec![0xdd, 0xff, 0xff, 0xff, 0xff],
        b"\x81\xa5ima".to_vec(),
    ] {
        let error = TestHost::new().raw(&bytes).unwrap_err();
        assert_eq!(error.option, "config.*");
    }
}

#[test]
fn every_encoding_of_a_value_is_decoded() {
    let host = with_ports();
    let text = |text: &str| Value::from(text);
    let map = |pairs: &[(&str, Value)]| {
        Value::Map(
            pairs
                .iter()
                .map(|(key, value)| (text(key), value.clone()))
                .collect(),
        )
    };
    let body = map(&[
        ("image", text("tree")),
        ("boot", Value::from(false)),
        ("from_the_future", Value::from(1)),
        (
            "command",
            Value::Array(vec![text("a"), Value::Nil, text("b")]),
        ),
        (
            "environment",
            Value::Array(vec![
                map(&[("A", text("1")), ("B", text("1"))]),
                Value::Nil,
                map(&[("B", text("2")), ("A", Value::Nil)]),
            ]),
        ),
        (
            "port_map",
            map(&[
                ("old", Value::F64(80.0)),
                ("web", text("81")),
                ("raw", Value::from(82)),
            ]),
        ),
    ]);
    let spec = host.raw(&encode(&body)).unwrap().spec;
    assert_eq!(spec.payload.command, ["a", "b"]);
    assert_eq!(
        (
            &*spec.payload.environment["A"],
            &*spec.payload.environment["B"]
        ),
        ("1", "2")
    );
    let NetworkNamespace::Private { ports, .. } = spec.network.namespace else {
        panic!("ports make a private network");
    };
    let inside: Vec<_> = ports.iter().map(|port| port.container).collect();
    assert_eq!(inside, [80, 82, 81, 20002]);
}
