//! The messages in Rust are those of the published files: each, with every field set, is read back by its definition
//! there, field by field and with nothing left over.
#![allow(clippy::unwrap_used, clippy::panic)] // helpers of tests fail by panicking

use std::fmt::Debug;

use cofferdam_container_protocol::message::*;
use prost_reflect::{DescriptorPool, DynamicMessage, Kind, ReflectMessage, Value};

fn pool() -> DescriptorPool {
    let files = protox::compile(["container.proto", "ttrpc.proto"], [env!("CARGO_MANIFEST_DIR")]).unwrap();
    DescriptorPool::from_file_descriptor_set(files).unwrap()
}

/// A value that no field has by itself, other ones for other numbers.
fn example(kind: &Kind, number: u32) -> Value {
    match kind {
        Kind::String => Value::String(format!("text {number}")),
        Kind::Bytes => Value::Bytes(vec![number as u8].into()),
        Kind::Bool => Value::Bool(true),
        Kind::Uint32 => Value::U32(1000 + number),
        Kind::Uint64 => Value::U64((1 << 40) + u64::from(number)),
        Kind::Int32 => Value::I32(-1000 - number as i32),
        Kind::Int64 => Value::I64(-(1 << 40) - i64::from(number)),
        Kind::Enum(_) => Value::EnumNumber(2),
        Kind::Message(message) => Value::Message(full(DynamicMessage::new(message.clone()))),
        other => panic!("{other:?}"),
    }
}

fn full(mut message: DynamicMessage) -> DynamicMessage {
    for field in message.descriptor().fields().collect::<Vec<_>>() {
        let value = example(&field.kind(), field.number());
        let value = if field.is_list() { Value::List(vec![value.clone(), value]) } else { value };
        message.set_field(&field, value);
    }
    message
}

/// What the published definition writes, the Rust one reads and writes alike; and both have the same names.
fn same<M: Message + Default + Debug>(pool: &DescriptorPool, name: &str) {
    let published = full(DynamicMessage::new(pool.get_message_by_name(name).unwrap()));
    let bytes = published.encode_to_vec();
    let message = M::decode(&*bytes).unwrap();
    assert_eq!(message.encode_to_vec(), bytes, "{name}: {message:?}");
    let debug = format!("{message:?}");
    for field in published.descriptor().fields() {
        assert!(debug.contains(&format!("{}:", field.name())), "{name} has no {}: {debug}", field.name());
    }
    assert_eq!(
        published.descriptor().fields().len(),
        fields_at_the_top(&debug),
        "{name} has other fields: {debug}"
    );
}

/// How many fields the first level of a `Debug` form has.
fn fields_at_the_top(debug: &str) -> usize {
    let mut depth = 0;
    debug
        .split("")
        .filter(|piece| {
            match *piece {
                "{" | "[" | "(" => depth += 1,
                "}" | "]" | ")" => depth -= 1,
                ":" => return depth == 1,
                _ => {}
            }
            false
        })
        .count()
}

#[test]
fn messages_are_as_published() {
    let pool = pool();
    same::<Request>(&pool, "ttrpc.Request");
    same::<Response>(&pool, "ttrpc.Response");
    same::<Status>(&pool, "ttrpc.Status");
    let name = |name: &str| format!("cofferdam.container.v1.{name}");
    same::<StateRequest>(&pool, &name("StateRequest"));
    same::<StateResponse>(&pool, &name("StateResponse"));
    same::<WaitRequest>(&pool, &name("WaitRequest"));
    same::<WaitResponse>(&pool, &name("WaitResponse"));
    same::<SignalRequest>(&pool, &name("SignalRequest"));
    same::<SignalResponse>(&pool, &name("SignalResponse"));
    same::<ExecRequest>(&pool, &name("ExecRequest"));
    same::<ExecResponse>(&pool, &name("ExecResponse"));
    same::<ResizeRequest>(&pool, &name("ResizeRequest"));
    same::<ResizeResponse>(&pool, &name("ResizeResponse"));
    same::<StatsRequest>(&pool, &name("StatsRequest"));
    same::<StatsResponse>(&pool, &name("StatsResponse"));
    same::<Refused>(&pool, &name("Refused"));
    same::<StopRequest>(&pool, &name("StopRequest"));
    same::<StopResponse>(&pool, &name("StopResponse"));
    assert_eq!(pool.all_messages().count(), 18, "a message without a test");
}

#[test]
fn service_and_states_are_as_published() {
    let pool = pool();
    let service = pool.get_service_by_name(SERVICE).unwrap();
    let methods: Vec<_> = service.methods().map(|method| method.name().to_owned()).collect();
    assert_eq!(methods, Method::ALL.map(|method| method.name().to_owned()));
    for method in service.methods() {
        assert_eq!(method.input().name(), format!("{}Request", method.name()));
        assert_eq!(method.output().name(), format!("{}Response", method.name()));
        assert!(!method.is_client_streaming() && !method.is_server_streaming());
    }
    let states = pool.get_enum_by_name("cofferdam.container.v1.ProcessState").unwrap();
    for value in states.values() {
        let state = ProcessState::try_from(value.number()).unwrap();
        assert_eq!(value.name(), format!("PROCESS_STATE_{}", format!("{state:?}").to_uppercase()));
    }
    assert_eq!(states.values().len(), 4);
}
