//! The AWS query protocol: a form goes in, XML comes out. Knows no rules of any action.

use std::{collections::BTreeMap, fmt::Write as _};

use super::refusal::Refusal;

const NAMESPACE: &str = "https://sts.amazonaws.com/doc/2011-06-15/";
pub(super) const VERSION: &str = "2011-06-15";

/// The parameters of one request.
#[derive(Debug, Default)]
pub(super) struct Params(BTreeMap<String, String>);

impl Params {
    /// AWS takes the parameters from the body of a POST as well as from the query of a GET.
    pub(super) fn parse(query: Option<&str>, body: &[u8]) -> Self {
        let query = form_urlencoded::parse(query.unwrap_or_default().as_bytes()).into_owned();
        Self(query.chain(form_urlencoded::parse(body).into_owned()).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// `PolicyArns.member.1.arn`, `PolicyArns.member.2.arn`, … up to the first gap.
    pub(super) fn members(&self, list: &str, field: &str) -> Vec<String> {
        (1..).map_while(|n| self.0.get(&format!("{list}.member.{n}.{field}")).cloned()).collect()
    }
}

/// An element with either text or elements inside.
pub(super) enum Node {
    Text(&'static str, String),
    Element(&'static str, Vec<Node>),
}

pub(super) fn text(name: &'static str, value: impl Into<String>) -> Node {
    Node::Text(name, value.into())
}

pub(super) fn element(name: &'static str, children: Vec<Node>) -> Node {
    Node::Element(name, children)
}

pub(super) fn response(action: &str, result: Vec<Node>, request_id: &str) -> String {
    let mut xml = format!("<{action}Response xmlns=\"{NAMESPACE}\">\n  <{action}Result>\n");
    result.iter().for_each(|node| write_node(&mut xml, node, 4));
    let _ = writeln!(xml, "  </{action}Result>");
    write_node(&mut xml, &element("ResponseMetadata", vec![text("RequestId", request_id)]), 2);
    let _ = writeln!(xml, "</{action}Response>");
    xml
}

pub(super) fn error_response(refusal: &Refusal, request_id: &str) -> String {
    let fault = if refusal.status.is_server_error() { "Receiver" } else { "Sender" };
    let mut xml = format!("<ErrorResponse xmlns=\"{NAMESPACE}\">\n");
    let members =
        vec![text("Type", fault), text("Code", refusal.code.as_str()), text("Message", refusal.message.as_str())];
    write_node(&mut xml, &element("Error", members), 2);
    write_node(&mut xml, &text("RequestId", request_id), 2);
    xml.push_str("</ErrorResponse>\n");
    xml
}

fn write_node(xml: &mut String, node: &Node, indent: usize) {
    match node {
        Node::Text(name, value) => {
            let _ = writeln!(xml, "{:indent$}<{name}>{}</{name}>", "", escape(value));
        }
        Node::Element(name, children) => {
            let _ = writeln!(xml, "{:indent$}<{name}>", "");
            children.iter().for_each(|child| write_node(xml, child, indent + 2));
            let _ = writeln!(xml, "{:indent$}</{name}>", "");
        }
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
