//! The worked examples of Nomad's own encoder, and input that must be rejected.

use rstest::rstest;
use serde_json::json;

use super::*;

fn attr(name: &str, kind: &str, required: bool) -> hclspec::Spec {
    spec(Arm::Attr(hclspec::Attr {
        name: name.to_owned(),
        r#type: kind.to_owned(),
        required,
    }))
}

fn spec(arm: Arm) -> hclspec::Spec {
    hclspec::Spec { block: Some(arm) }
}

fn object(attributes: &[(&str, hclspec::Spec)]) -> hclspec::Spec {
    spec(Arm::Object(hclspec::Object {
        attributes: attributes
            .iter()
            .map(|(key, spec)| ((*key).to_owned(), spec.clone()))
            .collect(),
    }))
}

fn literal(text: &str) -> hclspec::Spec {
    spec(Arm::Literal(hclspec::Literal {
        value: text.to_owned(),
    }))
}

fn default(primary: hclspec::Spec, value: &str) -> hclspec::Spec {
    spec(Arm::Default(Box::new(hclspec::Default {
        primary: Some(Box::new(primary)),
        default: Some(Box::new(literal(value))),
    })))
}

fn f_and_g() -> hclspec::Spec {
    object(&[
        ("f", attr("", "string", false)),
        ("g", attr("", "number", false)),
    ])
}

fn block() -> hclspec::Spec {
    object(&[(
        "b",
        spec(Arm::BlockValue(Box::new(hclspec::Block {
            name: "b".to_owned(),
            required: false,
            nested: Some(Box::new(f_and_g())),
        }))),
    )])
}

fn block_list() -> hclspec::Spec {
    object(&[(
        "b",
        spec(Arm::BlockList(Box::new(hclspec::BlockList {
            name: "b".to_owned(),
            min_items: 0,
            max_items: 2,
            nested: Some(Box::new(f_and_g())),
        }))),
    )])
}

fn block_attrs() -> hclspec::Spec {
    object(&[(
        "b",
        spec(Arm::BlockAttrs(hclspec::BlockAttrs {
            name: "b".to_owned(),
            r#type: "string".to_owned(),
            required: false,
        })),
    )])
}

fn a(kind: &str) -> hclspec::Spec {
    object(&[("a", attr("", kind, false))])
}

fn hex(spec: &hclspec::Spec, body: &Value) -> Result<String, String> {
    let bytes =
        encode(Some(spec), body, &Variables::default(), "config").map_err(|e| e.to_string())?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[rstest]
#[case(object(&[]), json!({}), "80")]
#[case(a("string"), json!({}), "81a161c0")]
#[case(a("string"), json!({"a": null}), "81a161c0")]
#[case(a("string"), json!({"a": 5}), "81a161a135")]
#[case(a("number"), json!({"a": 128}), "81a161cc80")]
#[case(a("number"), json!({"a": 65536}), "81a161ce00010000")]
#[case(a("number"), json!({"a": -33}), "81a161d0df")]
#[case(a("number"), json!({"a": 9_223_372_036_854_775_807_i64}), "81a161cf7fffffffffffffff")]
#[case(a("number"), json!({"a": 1.5}), "81a161cb3ff8000000000000")]
#[case(a("number"), json!({"a": 0.1}), "81a161a3302e31")]
#[case(a("number"), json!({"a": 1000.0}), "81a161cd03e8")]
#[case(a("number"), json!({"a": "42"}), "81a1612a")]
#[case(a("bool"), json!({"a": "true"}), "81a161c3")]
#[case(a("list(string)"), json!({}), "81a161c0")]
#[case(a("list(string)"), json!({"a": []}), "81a16190")]
#[case(a("list(string)"), json!({"a": ["x", 1, true, null]}), "81a16194a178a131a474727565c0")]
#[case(a("list(map(string))"), json!({"a": [{"k": "v", "n": 1}]}), "81a1619182a16ba176a16ea131")]
#[case(a("list(map(string))"), json!({"a": [{"k": "v"}, {"z": "w"}]}), "81a1619281a16ba17681a17aa177")]
#[case(a("list(map(number))"), json!({"a": [{"http": 8080, "s": "53"}]}), "81a1619182a468747470cd1f90a17335")]
#[case(a("map(string)"), json!({"a": {"k": "v", "n": 1}}), "81a16182a16ba176a16ea131")]
#[case(block(), json!({}), "81a162c0")]
#[case(block(), json!({"b": null}), "81a162c0")]
#[case(block(), json!({"b": [{"f": "x", "g": 7}]}), "81a16282a166a178a16707")]
#[case(block(), json!({"b": {"f": "x"}}), "81a16282a166a178a167c0")]
#[case(block_list(), json!({}), "81a16290")]
#[case(
    block_list(),
    json!({"b": [{"f": "x"}, {"f": "y", "g": 1.5}]}),
    "81a1629282a166a178a167c082a166a179a167cb3ff8000000000000"
)]
#[case(block_attrs(), json!({"b": [{"x": "1"}]}), "81a16281a178a131")]
#[case(block_attrs(), json!({}), "81a162c0")]
#[case(object(&[("a", default(attr("a", "bool", false), "true"))]), json!({}), "81a161c3")]
#[case(object(&[("a", default(attr("a", "bool", false), "true"))]), json!({"a": null}), "81a161c3")]
#[case(object(&[("a", default(attr("a", "bool", false), "true"))]), json!({"a": false}), "81a161c2")]
#[case(object(&[("a", default(attr("a", "string", false), "\"5m\""))]), json!({}), "81a161a2356d")]
#[case(object(&[("a", default(attr("a", "string", false), "5"))]), json!({}), "81a16105")]
#[case(object(&[("a", default(attr("a", "number", false), "-5"))]), json!({}), "81a161fb")]
#[case(object(&[("a", attr("", "string", true))]), json!({"a": null}), "81a161c0")]
fn values_are_encoded_as_nomad_encodes_them(
    #[case] spec: hclspec::Spec,
    #[case] body: Value,
    #[case] bytes: &str,
) {
    assert_eq!(hex(&spec, &body).as_deref(), Ok(bytes));
}

#[rstest]
#[case(a("list(map(string))"), json!({"a": {"k": "v"}}), "config.a: ")]
#[case(a("list(map(string))"), json!({"a": [{"k": ["x"]}]}), "config.a[0][\"k\"]: ")]
#[case(a("map(string)"), json!({"a": [{"k": "v"}]}), "is not a map(string)")]
#[case(a("bool"), json!({"a": "yes"}), "config.a: \"yes\" is not a bool")]
#[case(a("bool"), json!({"a": 1}), "is not a bool")]
#[case(a("number"), json!({"a": "0x10"}), "is not a number")]
#[case(a("number"), json!({"a": "inf"}), "is not a number")]
#[case(a("list(string)"), json!({"a": "x"}), "is not a list(string)")]
#[case(a("string"), json!({"b": 1}), "config: unknown option \"b\"; known options are a")]
#[case(block(), json!({"b": {"h": 1}}), "config.b: unknown option \"h\"")]
#[case(block(), json!({"b": [{}, {}]}), "config.b: is set more than once")]
#[case(block_attrs(), json!({"b": [{"x": "1"}, {"y": "2"}]}), "more than once")]
#[case(block_list(), json!({"b": [{}, {}, {}]}), "occurs 3 times")]
#[case(object(&[("a", attr("", "string", true))]), json!({}), "config.a: is required")]
#[case(a("any"), json!({}), "not supported by this host")]
#[case(a("string"), json!({"a": "${NOPE}"}), "config.a: ${NOPE} is not known")]
#[case(object(&[("a", literal("upper(\"x\")"))]), json!({}), "not supported by this host")]
fn a_value_that_does_not_fit_the_schema_is_named(
    #[case] spec: hclspec::Spec,
    #[case] body: Value,
    #[case] part: &str,
) {
    let error = hex(&spec, &body).unwrap_err();
    assert!(error.contains(part), "{error}");
}

#[test]
fn variables_are_replaced_before_the_conversion() {
    let spec = object(&[
        ("a", attr("", "string", false)),
        ("n", attr("", "number", false)),
    ]);
    let variables = Variables {
        environment: [("NOMAD_TASK_NAME", "web"), ("NOMAD_PORT_http", "8080")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
        ..Variables::default()
    };
    let body = json!({"a": "${NOMAD_TASK_NAME}-x", "n": "${NOMAD_PORT_http}"});
    let bytes = encode(Some(&spec), &body, &variables, "config").unwrap();
    assert_eq!(bytes, b"\x82\xa1a\xa5web-x\xa1n\xcd\x1f\x90");
}

#[test]
fn without_a_schema_no_option_is_accepted() {
    let variables = Variables::default();
    assert_eq!(
        encode(None, &json!({}), &variables, "plugin"),
        Ok(Vec::new())
    );
    let error = encode(None, &json!({"x": 1}), &variables, "plugin").unwrap_err();
    assert_eq!(error.option, "plugin");
}
