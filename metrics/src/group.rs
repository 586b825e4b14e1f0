//! Metrics that belong together, and what they say at one moment.

use std::borrow::Cow;

use crate::latency::Distribution;

/// What one metric says at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading {
    /// A count since the start.
    Counter(u64),
    /// A time of now, microseconds.
    Micros(u64),
    /// Times since the start.
    Latency(Box<Distribution>),
}

impl Reading {
    /// Adds what the same metric of another one of the kind says. Of times of now the longer one stays.
    fn merge(&mut self, other: &Self) {
        match (self, other) {
            (Self::Counter(count), Self::Counter(more)) => *count = count.wrapping_add(*more),
            (Self::Micros(time), Self::Micros(other)) => *time = (*time).max(*other),
            (Self::Latency(times), Self::Latency(more)) => times.merge(more),
            _ => {}
        }
    }
}

/// One metric and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Its name in the JSON.
    pub name: Cow<'static, str>,
    /// What it means, a phrase.
    pub help: Cow<'static, str>,
    /// What it says.
    pub reading: Reading,
}

impl Field {
    /// A field; `help` may begin with a space, as documentation comments do.
    pub fn new(
        name: impl Into<Cow<'static, str>>,
        help: impl Into<Cow<'static, str>>,
        reading: Reading,
    ) -> Self {
        let help = match help.into() {
            Cow::Borrowed(help) => Cow::Borrowed(help.trim()),
            help => help,
        };
        Self { name: name.into(), help, reading }
    }
}

/// Metrics that can be read; made by [`crate::group!`].
pub trait Metrics {
    /// What they say now, always in the same order.
    fn fields(&self) -> Vec<Field>;
}

/// Metrics of one thing at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What kind of thing it is: `block`, `vcpu`.
    pub family: &'static str,
    /// Which one of them, where there are several: what names it, and its name.
    pub member: Option<(&'static str, String)>,
    /// What is known of it.
    pub fields: Vec<Field>,
}

impl Group {
    /// That of the only thing of its kind.
    pub fn of(family: &'static str, metrics: &dyn Metrics) -> Self {
        Self { family, member: None, fields: metrics.fields() }
    }

    /// That of one thing of several: the one whose `label` is `name`.
    pub fn member(family: &'static str, label: &'static str, name: &str, metrics: &dyn Metrics) -> Self {
        Self { family, member: Some((label, name.to_owned())), fields: metrics.fields() }
    }

    /// That of all things of a kind together. Without any, all is 0.
    pub fn sum<'a, M: Metrics + Default + 'a>(
        family: &'static str,
        all: impl IntoIterator<Item = &'a M>,
    ) -> Self {
        let mut sum = Self::of(family, &M::default());
        for metrics in all {
            for (field, other) in sum.fields.iter_mut().zip(metrics.fields()) {
                field.reading.merge(&other.reading);
            }
        }
        sum
    }

    /// Its name in the JSON.
    pub fn name(&self) -> Cow<'static, str> {
        match &self.member {
            None => Cow::Borrowed(self.family),
            Some((_, name)) => Cow::Owned(format!("{}_{name}", self.family)),
        }
    }
}

/// Makes a struct of metrics, in which the documentation of each field is what is told of it everywhere.
///
/// ```
/// cofferdam_metrics::group! {
///     /// Of a door.
///     pub struct DoorMetrics {
///         /// Times that it was opened
///         pub opened_count: cofferdam_metrics::Counter,
///     }
/// }
/// use cofferdam_metrics::Metrics;
/// let door = DoorMetrics::default();
/// door.opened_count.count();
/// assert_eq!(door.fields()[0].help, "Times that it was opened");
/// ```
#[macro_export]
macro_rules! group {
    (
        $(#[doc = $about:literal])+
        pub struct $name:ident {
            $($(#[doc = $help:literal])+ pub $field:ident: $kind:ty,)+
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Debug, Default)]
        pub struct $name {
            $($(#[doc = $help])+ pub $field: $kind,)+
        }

        impl $crate::Metrics for $name {
            fn fields(&self) -> Vec<$crate::Field> {
                vec![$($crate::Field::new(stringify!($field), concat!($($help),+), self.$field.read()),)+]
            }
        }
    };
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Counter, LastTime, Latency};

    crate::group! {
        /// Of a test.
        pub struct Sample {
            /// Things done, on two
            /// lines
            pub done_count: Counter,
            /// How long the last one took
            pub last: LastTime,
            /// How long they take
            pub work_agg: Latency,
        }
    }

    impl Sample {
        pub fn doing(times: &[u64]) -> Self {
            let sample = Self::default();
            for micros in times {
                let time = Duration::from_micros(*micros);
                sample.done_count.count();
                sample.last.set(time);
                sample.work_agg.record(time);
            }
            sample
        }
    }

    #[test]
    fn a_field_tells_its_name_its_documentation_and_what_it_says() {
        let fields = Sample::doing(&[3, 2]).fields();
        let told: Vec<_> = fields.iter().map(|field| (&*field.name, &*field.help)).collect();
        assert_eq!(
            told,
            [
                ("done_count", "Things done, on two lines"),
                ("last", "How long the last one took"),
                ("work_agg", "How long they take"),
            ]
        );
        assert_eq!(
            fields[..2].iter().map(|field| field.reading.clone()).collect::<Vec<_>>(),
            [Reading::Counter(2), Reading::Micros(2)]
        );
    }

    #[test]
    fn a_sum_is_what_all_say_together() {
        let (a, b) = (Sample::doing(&[3, 5]), Sample::doing(&[9]));
        assert_eq!(Group::sum("work", [&a, &b]).fields[0].reading, Reading::Counter(3));
        assert_eq!(Group::sum("work", [&a, &b]).fields[1].reading, Reading::Micros(9));
        let whole = Sample::doing(&[3, 5, 9]).work_agg.read();
        assert_eq!(Group::sum("work", [&a, &b]).fields[2].reading, whole);
        assert_eq!(Group::sum::<Sample>("work", []), Group::of("work", &Sample::default()));
    }

    #[test]
    fn a_member_is_named_after_its_family() {
        assert_eq!(Group::of("block", &Sample::default()).name(), "block");
        assert_eq!(Group::member("block", "drive", "root", &Sample::default()).name(), "block_root");
    }
}
