//! The OpenAPI document of the interface. It is made from the routes of [`router`](crate::router) and from the
//! types of their bodies and answers, by a test of this module: so the monitor carries the finished text and
//! nothing that makes it. `COFFERDAM_UPDATE=1 cargo test -p cofferdam-api openapi` writes it anew; without
//! that the test fails when it is not what routes and types say.

/// The document, as JSON.
pub const DOCUMENT: &str = include_str!("../openapi.json");

#[cfg(test)]
mod tests {
    use std::{env, fs};

    use schemars::generate::SchemaSettings;
    use schemars::{JsonSchema, SchemaGenerator};
    use serde_json::{Map, Value, json};

    use super::DOCUMENT;
    use crate::actions::Version;
    use crate::config::{BootSource, DomainConfig, Drive, MachineConfig, Serial, Vsock};
    use crate::draft::Draft;
    use crate::observe::{LoggerConfig, MetricsConfig};
    use crate::requests::{DrivePatch, Exec, InstanceAction, Kill, MachinePatch, Resize, StateChange};
    use crate::router::{ROUTES, Route, TEXT};
    use crate::status::{ContainerStats, Executed, InstanceInfo, VmStatus};

    fn add<T: JsonSchema>(generator: &mut SchemaGenerator) {
        generator.subschema_for::<T>();
    }

    fn schemas() -> Map<String, Value> {
        let settings = SchemaSettings::draft2020_12().with(|settings| {
            settings.definitions_path = "/components/schemas".into();
        });
        let mut generator = settings.into_generator();
        for add in [
            add::<BootSource>,
            add::<ContainerStats>,
            add::<DomainConfig>,
            add::<Draft>,
            add::<Drive>,
            add::<DrivePatch>,
            add::<Exec>,
            add::<Executed>,
            add::<InstanceAction>,
            add::<InstanceInfo>,
            add::<Kill>,
            add::<LoggerConfig>,
            add::<MachineConfig>,
            add::<MachinePatch>,
            add::<MetricsConfig>,
            add::<Resize>,
            add::<Serial>,
            add::<StateChange>,
            add::<Version>,
            add::<VmStatus>,
            add::<Vsock>,
        ] {
            add(&mut generator);
        }
        let mut schemas = generator.take_definitions(true);
        schemas.insert("Object".into(), json!({"type": "object"}));
        schemas.insert(
            "Fault".into(),
            json!({
                "type": "object",
                "properties": {"fault_message": {"type": "string"}},
                "required": ["fault_message"],
            }),
        );
        schemas
    }

    fn content(schema: &str) -> Value {
        if schema == TEXT {
            return json!({"text/plain": {"schema": {"type": "string"}}});
        }
        json!({"application/json": {"schema": {"$ref": format!("#/components/schemas/{schema}")}}})
    }

    fn operation(route: &Route) -> Value {
        let mut parameters = Vec::new();
        if let Some((_, rest)) = route.path.split_once('{') {
            let name = rest.trim_end_matches('}');
            parameters
                .push(json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}));
        }
        if let Some((name, schema)) = route.query {
            parameters.push(json!({"name": name, "in": "query", "schema": {"type": schema}}));
        }
        let mut responses = Map::new();
        match route.answer {
            Some(schema) => responses
                .insert("200".into(), json!({"description": "The answer", "content": content(schema)})),
            None => responses.insert("204".into(), json!({"description": "Done"})),
        };
        let refused = json!({"description": "Refused; nothing has changed", "content": content("Fault")});
        responses.insert("400".into(), refused);
        let mut operation = json!({"summary": route.summary, "responses": responses});
        if !parameters.is_empty() {
            operation["parameters"] = parameters.into();
        }
        if let Some(schema) = route.body {
            operation["requestBody"] = json!({"required": true, "content": content(schema)});
        }
        operation
    }

    fn made() -> Value {
        let mut paths = Map::new();
        for route in ROUTES {
            let methods = paths.entry(route.path).or_insert_with(|| json!({}));
            methods[route.method.to_lowercase()] = operation(route);
        }
        json!({
            "openapi": "3.1.0",
            "info": {"title": "Cofferdam monitor", "version": env!("CARGO_PKG_VERSION")},
            "paths": paths,
            "components": {"schemas": schemas()},
        })
    }

    #[test]
    fn the_openapi_document_is_what_routes_and_types_say() {
        let made = format!("{:#}\n", made());
        if env::var_os("COFFERDAM_UPDATE").is_some() {
            fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json"), made).unwrap();
            return;
        }
        assert_eq!(made, DOCUMENT, "COFFERDAM_UPDATE=1 writes it anew");
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let references = DOCUMENT.split("\"$ref\": \"#").skip(1).filter_map(|rest| rest.split('"').next());
        let mut count = 0;
        for reference in references {
            assert!(document.pointer(reference).is_some(), "{reference}");
            count += 1;
        }
        assert!(count > ROUTES.len());
    }
}
