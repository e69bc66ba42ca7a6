//! Parses the part of HCL2 that can be evaluated without Nomad: literals, heredocs, `variable` defaults, `locals`.
//! References to values that are known only when the task starts stay text, as in Nomad. Everything else is rejected
//! with its line.

use std::collections::BTreeMap;

use hcl::edit::Span;
use hcl::edit::expr::{Expression, ObjectKey, Traversal, TraversalOperator, UnaryOperator};
use hcl::edit::parser::parse_body;
use hcl::edit::structure::{Attribute, Block, Body, Structure};
use hcl::edit::template::{Element, Template};
use serde_json::{Map, Value};

use super::tree::{Entry, JobError, Thing};

/// Roots of references that an unquoted expression may start with.
const RUN_TIME_ROOTS: [&str; 5] = ["env", "meta", "node", "attr", "device"];

/// Parses a file; its `variable` and `locals` blocks are evaluated and left out of the result.
pub(super) fn read(source: &str) -> Result<Vec<Entry>, JobError> {
    let body = parse_body(source).map_err(|error| {
        let reason = format!("not HCL: {}", error.message());
        JobError::new(Some(error.location().line()), reason)
    })?;
    let mut reader = Reader {
        source,
        variables: BTreeMap::new(),
        locals: BTreeMap::new(),
    };
    let blocks = |name: &'static str| {
        body.iter()
            .filter_map(move |s| s.as_block().filter(|b| b.has_ident(name)))
    };
    for block in blocks("variable") {
        reader.variable(block)?;
    }
    for block in blocks("locals") {
        for attribute in block.body.attributes() {
            let value = reader.value(&attribute.value)?;
            reader
                .locals
                .insert(attribute.key.as_str().to_owned(), value);
        }
    }
    let mut entries = reader.body(&body)?;
    entries.retain(|entry| entry.name != "variable" && entry.name != "locals");
    Ok(entries)
}

struct Reader<'a> {
    source: &'a str,
    /// `None` for a variable without a default.
    variables: BTreeMap<String, Option<Value>>,
    locals: BTreeMap<String, Value>,
}

impl Reader<'_> {
    fn variable(&mut self, block: &Block) -> Result<(), JobError> {
        let [name] = block.labels.as_slice() else {
            return Err(self.error(block, "a variable block has one label, its name"));
        };
        let default = block.body.get_attribute("default");
        let default = default
            .map(|attribute| self.value(&attribute.value))
            .transpose()?;
        self.variables.insert(name.as_str().to_owned(), default);
        Ok(())
    }

    fn body(&self, body: &Body) -> Result<Vec<Entry>, JobError> {
        body.iter()
            // Types and validations of variables are not values.
            .filter(|s| {
                !s.as_block()
                    .is_some_and(|block| block.has_ident("variable"))
            })
            .map(|structure| match structure {
                Structure::Attribute(attribute) => self.attribute(attribute),
                Structure::Block(block) => self.block(block),
            })
            .collect()
    }

    fn attribute(&self, attribute: &Attribute) -> Result<Entry, JobError> {
        Ok(Entry {
            name: attribute.key.as_str().to_owned(),
            line: self.line(attribute),
            thing: Thing::Value {
                value: self.value(&attribute.value)?,
                literal: attribute.value.is_object(),
            },
        })
    }

    fn block(&self, block: &Block) -> Result<Entry, JobError> {
        if block.has_ident("dynamic") {
            return Err(self.error(block, "dynamic blocks are not evaluated here"));
        }
        let labels = block.labels.iter().map(|label| label.as_str().to_owned());
        Ok(Entry {
            name: block.ident.as_str().to_owned(),
            line: self.line(block),
            thing: Thing::Block {
                labels: labels.collect(),
                body: self.body(&block.body)?,
            },
        })
    }

    fn value(&self, expression: &Expression) -> Result<Value, JobError> {
        let refuse = |construct: String| {
            let reason = format!("{construct} can't be evaluated here; write the value itself");
            Err(self.error(expression, reason))
        };
        match expression {
            Expression::Null(_) => Ok(Value::Null),
            Expression::Bool(flag) => Ok(Value::Bool(*flag.value())),
            Expression::Number(number) => match serde_json::to_value(number.value()) {
                Ok(value) => Ok(value),
                Err(error) => refuse(format!("this number ({error})")),
            },
            Expression::String(text) => Ok(Value::String(text.value().clone())),
            Expression::Array(items) => items.iter().map(|item| self.value(item)).collect(),
            Expression::Object(object) => {
                let mut out = Map::new();
                for (key, value) in object {
                    out.insert(self.key(key)?, self.value(value.expr())?);
                }
                Ok(Value::Object(out))
            }
            Expression::StringTemplate(template) => {
                let elements: Vec<&Element> = template.iter().collect();
                self.template(expression, &elements)
            }
            Expression::HeredocTemplate(heredoc) => self.heredoc(expression, &heredoc.template),
            Expression::Parenthesis(inner) => self.value(inner.inner()),
            Expression::Variable(name) if name.as_str().starts_with("NOMAD_") => {
                Ok(Value::String(format!("${{{}}}", name.as_str())))
            }
            Expression::Variable(name) => refuse(format!("the bare word {}", name.as_str())),
            Expression::Traversal(traversal) => self.traversal(expression, traversal, false),
            Expression::UnaryOp(operation) => {
                let value = self.value(&operation.expr)?;
                match (operation.operator.value(), &value) {
                    (UnaryOperator::Not, Value::Bool(flag)) => Ok(Value::Bool(!flag)),
                    (UnaryOperator::Neg, Value::Number(number)) => {
                        let negative = format!("-{number}");
                        serde_json::from_str(&negative)
                            .or_else(|_| refuse(format!("the number {negative}")))
                    }
                    _ => refuse("the operator".to_owned()),
                }
            }
            Expression::FuncCall(call) => {
                refuse(format!("the function {}(…)", call.name.name.as_str()))
            }
            Expression::Conditional(_) => refuse("the conditional (… ? … : …)".to_owned()),
            Expression::BinaryOp(_) => refuse("the operator".to_owned()),
            Expression::ForExpr(_) => refuse("the for expression".to_owned()),
        }
    }

    fn key(&self, key: &ObjectKey) -> Result<String, JobError> {
        match key {
            ObjectKey::Ident(name) => Ok(name.as_str().to_owned()),
            ObjectKey::Expression(expression) => match self.value(expression)? {
                Value::String(text) => Ok(text),
                value @ (Value::Number(_) | Value::Bool(_)) => Ok(value.to_string()),
                _ => Err(self.error(expression, "this can't be the key of an object")),
            },
        }
    }

    fn heredoc(&self, at: &Expression, template: &Template) -> Result<Value, JobError> {
        let elements: Vec<&Element> = template.iter().collect();
        // Unlike a quoted string, a heredoc that consists of one reference is text: it ends with a line break.
        self.text(at, &elements).map(Value::String)
    }

    fn template(&self, at: &Expression, elements: &[&Element]) -> Result<Value, JobError> {
        if let [Element::Interpolation(part)] = elements {
            return self.reference(&part.expr);
        }
        self.text(at, elements).map(Value::String)
    }

    fn text(&self, at: &Expression, elements: &[&Element]) -> Result<String, JobError> {
        let mut out = String::new();
        for element in elements {
            match element {
                Element::Literal(literal) => out.push_str(literal.value()),
                Element::Interpolation(part) => match self.reference(&part.expr)? {
                    Value::String(text) => out.push_str(&text),
                    value @ (Value::Number(_) | Value::Bool(_)) => out.push_str(&value.to_string()),
                    _ => {
                        return Err(self.error(
                            at,
                            "only a string, number or bool can be used inside a string",
                        ));
                    }
                },
                Element::Directive(_) => {
                    let reason = "the template directive (%{…}) can't be evaluated here; write the value itself";
                    return Err(self.error(at, reason));
                }
            }
        }
        Ok(out)
    }

    /// Evaluates the content of `${…}`, in which unknown names are kept until the task starts.
    fn reference(&self, expression: &Expression) -> Result<Value, JobError> {
        match expression {
            Expression::Variable(name) => Ok(Value::String(format!("${{{}}}", name.as_str()))),
            Expression::Traversal(traversal) => self.traversal(expression, traversal, true),
            other => self.value(other),
        }
    }

    fn traversal(
        &self,
        at: &Expression,
        traversal: &Traversal,
        in_text: bool,
    ) -> Result<Value, JobError> {
        let text = at.to_string().trim().to_owned();
        let Some(root) = traversal.expr.as_variable().map(|name| name.as_str()) else {
            return Err(self.error(
                at,
                format!("{text} can't be evaluated here; write the value itself"),
            ));
        };
        let mut steps = traversal.operators.iter().map(|operator| operator.value());
        if root != "var" && root != "local" {
            let splat = |o: &TraversalOperator| {
                matches!(
                    o,
                    TraversalOperator::AttrSplat(_) | TraversalOperator::FullSplat(_)
                )
            };
            if (in_text || RUN_TIME_ROOTS.contains(&root)) && !steps.any(splat) {
                return Ok(Value::String(format!("${{{text}}}")));
            }
            return Err(self.error(
                at,
                format!("{text} can't be evaluated here; write the value itself"),
            ));
        }
        let name = match steps.next() {
            Some(TraversalOperator::GetAttr(name)) => name.as_str().to_owned(),
            _ => return Err(self.error(at, format!("{text}: a name must follow {root}."))),
        };
        let mut value = if root == "var" {
            match self.variables.get(&name) {
                Some(Some(value)) => value.clone(),
                Some(None) => {
                    return Err(self.error(
                        at,
                        format!("var.{name} has no default, and `run` can't set variables"),
                    ));
                }
                None => return Err(self.error(at, format!("there is no variable block {name:?}"))),
            }
        } else {
            let local = self.locals.get(&name).cloned();
            local.ok_or_else(|| {
                self.error(at, format!("local.{name} is not defined before this line"))
            })?
        };
        for step in steps {
            let next = match step {
                TraversalOperator::GetAttr(name) => value.get(name.as_str()).cloned(),
                TraversalOperator::Index(key) => match self.value(key)? {
                    Value::String(key) => value.get(key).cloned(),
                    Value::Number(index) => index
                        .as_u64()
                        .and_then(|index| usize::try_from(index).ok())
                        .and_then(|index| value.get(index).cloned()),
                    _ => None,
                },
                _ => None,
            };
            value = next.ok_or_else(|| self.error(at, format!("{text} does not exist")))?;
        }
        Ok(value)
    }

    fn line(&self, of: &impl Span) -> Option<usize> {
        let start = of.span()?.start;
        let before = self.source.get(..start)?;
        Some(before.matches('\n').count() + 1)
    }

    fn error(&self, at: &impl Span, reason: impl Into<String>) -> JobError {
        JobError::new(self.line(at), reason)
    }
}
