//! The published JSON schema, `schema.json`, which is made of the types.

use std::{env, fs};

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use crate::Manifest;

const PUBLISHED: &str = include_str!("../schema.json");

/// No field may be left out, not even one that may be null.
fn require_all(value: &mut Value) {
    if let Some(properties) = value.get("properties").and_then(Value::as_object).map(Map::keys) {
        let names: Vec<Value> = properties.cloned().map(Value::from).collect();
        value["required"] = names.into();
    }
    match value {
        Value::Object(members) => members.values_mut().for_each(require_all),
        Value::Array(elements) => elements.iter_mut().for_each(require_all),
        _ => {}
    }
}

#[test]
fn the_published_schema_is_what_the_types_say() {
    let mut schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<Manifest>();
    let mut value = std::mem::take(&mut schema).to_value();
    value["title"] = "Container manifest of Cofferdam".into();
    value["properties"]["version"] =
        serde_json::json!({"description": "Version of this schema.", "const": 1});
    require_all(&mut value);
    let made = format!("{value:#}\n");
    if env::var_os("COFFERDAM_UPDATE").is_some() {
        fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/schema.json"), made).unwrap();
        return;
    }
    assert_eq!(made, PUBLISHED, "COFFERDAM_UPDATE=1 writes it anew");
}
