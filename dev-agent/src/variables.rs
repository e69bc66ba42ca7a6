//! Replaces the `${…}` names that are available when a task starts: its environment and the node's properties. Does not
//! evaluate functions and operators; they are rejected by name.

use std::collections::BTreeMap;

use hcl::edit::Ident;
use hcl::edit::expr::{Expression, Traversal, TraversalOperator};
use hcl::edit::parser::parse_template;
use hcl::edit::template::Element;

/// The values for `${…}`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Variables {
    /// The task's environment: `${NAME}`, `${env["NAME"]}`, `${env.NAME}`.
    pub environment: BTreeMap<String, String>,
    /// The node's properties under their full names, such as `node.datacenter` and `meta.rack`.
    pub node: BTreeMap<String, String>,
}

/// A text that can't be evaluated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TemplateError(String);

impl Variables {
    /// Evaluates a string of a driver configuration: an HCL template in which an unknown name is an error.
    pub fn evaluate(&self, text: &str) -> Result<String, TemplateError> {
        if !text.contains("${") && !text.contains("%{") {
            return Ok(text.to_owned());
        }
        let template = parse_template(text).map_err(|error| {
            TemplateError(format!("{text:?} is not a template: {}", error.message()))
        })?;
        let mut out = String::new();
        for element in &template {
            match element {
                Element::Literal(literal) => out.push_str(literal),
                Element::Interpolation(part) => out.push_str(self.name(&part.expr)?),
                Element::Directive(_) => {
                    return Err(TemplateError(format!(
                        "{text:?}: directives (%{{…}}) are not evaluated here"
                    )));
                }
            }
        }
        Ok(out)
    }

    /// Replaces the known names and leaves everything else as it is, as Nomad does outside of `config`.
    pub fn replace(&self, text: &str) -> String {
        let mut out = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            out.push_str(before);
            match after.split_once('}') {
                Some((name, tail)) => {
                    match self.find(name.trim()) {
                        Some(value) => out.push_str(value),
                        None => out.push_str(&format!("${{{name}}}")),
                    }
                    rest = tail;
                }
                None => {
                    out.push_str("${");
                    rest = after;
                }
            }
        }
        out.push_str(rest);
        out
    }

    fn name(&self, expression: &Expression) -> Result<&str, TemplateError> {
        let name = match expression {
            Expression::Variable(name) => name.as_str().to_owned(),
            Expression::Traversal(traversal) => dotted(traversal).ok_or_else(|| {
                TemplateError(format!("${{{}}} can't be evaluated here", show(expression)))
            })?,
            Expression::FuncCall(call) => {
                return Err(TemplateError(format!(
                    "${{{}}}: the function {} can't be evaluated here",
                    show(expression),
                    call.name.name.as_str()
                )));
            }
            other => {
                return Err(TemplateError(format!(
                    "${{{}}} can't be evaluated here",
                    show(other)
                )));
            }
        };
        self.find(&name).ok_or_else(|| {
            let hint = if name.starts_with("node.")
                || name.starts_with("attr.")
                || name.starts_with("meta.")
            {
                "; there is no client node that has such a property"
            } else {
                ""
            };
            TemplateError(format!(
                "${{{}}} is not known when the task starts{hint}",
                show(expression)
            ))
        })
    }

    fn find(&self, name: &str) -> Option<&str> {
        let bare = name
            .strip_prefix("env.")
            .or_else(|| name.strip_prefix("env[\"")?.strip_suffix("\"]"));
        let found = match bare {
            Some(bare) => self.environment.get(bare),
            None => self.environment.get(name).or_else(|| self.node.get(name)),
        };
        found.map(String::as_str)
    }
}

/// `a.b["c"]` as `a.b.c`; `None` if it does not consist of names only.
fn dotted(traversal: &Traversal) -> Option<String> {
    let mut out = traversal.expr.as_variable()?.as_str().to_owned();
    for operator in &traversal.operators {
        out.push('.');
        match operator.value() {
            TraversalOperator::GetAttr(name) => out.push_str(Ident::as_str(name)),
            TraversalOperator::Index(key) => out.push_str(key.as_str()?),
            _ => return None,
        }
    }
    Some(out)
}

fn show(expression: &Expression) -> String {
    expression.to_string().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn variables() -> Variables {
        let map = |pairs: &[(&str, &str)]| {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        Variables {
            environment: map(&[("NOMAD_TASK_NAME", "web"), ("ODD.KEY", "odd")]),
            node: map(&[("meta.rack", "r1")]),
        }
    }

    #[rstest]
    #[case("plain", "plain")]
    #[case("${NOMAD_TASK_NAME}-x", "web-x")]
    #[case("${env[\"ODD.KEY\"]}", "odd")]
    #[case("${env.NOMAD_TASK_NAME}", "web")]
    #[case("${meta.rack}", "r1")]
    #[case("a $${NOMAD_TASK_NAME} b", "a ${NOMAD_TASK_NAME} b")]
    #[case("%%{x} ${NOMAD_TASK_NAME}", "%{x} web")]
    #[case("100% $5", "100% $5")]
    #[case("\\n ${NOMAD_TASK_NAME}", "\\n web")]
    fn names_are_replaced(#[case] text: &str, #[case] expected: &str) {
        assert_eq!(variables().evaluate(text).as_deref(), Ok(expected));
    }

    #[rstest]
    #[case("${NOPE}", "${NOPE} is not known")]
    #[case("${node.unique.name}", "no client node")]
    #[case("${upper(NOMAD_TASK_NAME)}", "the function upper")]
    #[case("${1 + 1}", "can't be evaluated")]
    #[case("%{ if true }x%{ endif }", "directives")]
    #[case("${", "not a template")]
    fn an_expression_other_than_a_name_is_refused(#[case] text: &str, #[case] part: &str) {
        let error = variables().evaluate(text).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }

    #[test]
    fn outside_of_config_unknown_names_are_kept() {
        let out = variables().replace("${NOMAD_TASK_NAME} ${NOPE} ${env[\"ODD.KEY\"]} ${");
        assert_eq!(out, "web ${NOPE} odd ${");
    }
}
