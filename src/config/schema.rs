//! Converts the option table to Nomad's schema language. Adds nothing to the table.

use crate::proto::hclspec::{
    Attr, Block, BlockList, Default as Fallback, Literal, Object, Spec, spec,
};

use super::options::{Kind, OptionSpec};

/// The schema of a block that has these options.
pub(super) fn block(options: &[OptionSpec]) -> Spec {
    let attributes = options
        .iter()
        .map(|option| (option.name.to_owned(), attribute(option)))
        .collect();
    of(spec::Block::Object(Object { attributes }))
}

fn attribute(option: &OptionSpec) -> Spec {
    let name = option.name.to_owned();
    match option.kind {
        Kind::Block(options) => {
            return of(spec::Block::BlockValue(Box::new(Block {
                name,
                required: option.required,
                nested: Some(Box::new(block(options))),
            })));
        }
        Kind::Blocks(options) => {
            return of(spec::Block::BlockList(Box::new(BlockList {
                name,
                nested: Some(Box::new(block(options))),
                // No limits: 0 items at most means any number.
                min_items: 0,
                max_items: 0,
            })));
        }
        _ => {}
    }
    let plain = of(spec::Block::Attr(Attr {
        name,
        r#type: option.kind.expression().to_owned(),
        required: option.required,
    }));
    match option.default {
        None => plain,
        Some(literal) => of(spec::Block::Default(Box::new(Fallback {
            primary: Some(Box::new(plain)),
            default: Some(Box::new(of(spec::Block::Literal(Literal {
                value: literal.to_owned(),
            })))),
        }))),
    }
}

fn of(block: spec::Block) -> Spec {
    Spec { block: Some(block) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message as _;

    #[test]
    fn a_default_is_encoded_as_nomad_expects() {
        let enabled = OptionSpec {
            name: "enabled",
            kind: Kind::Bool,
            default: Some("true"),
            required: false,
            doc: "",
        };
        let hex: String = block(&[enabled])
            .encode_to_vec()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(
            hex,
            "0a2c0a2a0a07656e61626c6564121f4a1d0a111a0f0a07656e61626c65641204626f6f6c120852060a0474727565"
        );
    }
}
