//! What is counted of requests, by their routes.

use cofferdam_metrics::{Counter, Field, Group, LastTime, Latency, group};

use crate::router::ROUTES;

group! {
    /// Of the API's server.
    pub struct ServerMetrics {
        /// From the start of the monitor until its API could be reached
        pub process_startup_time_us: LastTime,
        /// Processor time of the monitor until its API could be reached
        pub process_startup_time_cpu_us: LastTime,
        /// Requests that have no route, or were too large or too slow to be read
        pub invalid_requests_count: Counter,
        /// Time from a whole request to its answer; those that wait for the end of the domain are left out
        pub requests_agg: Latency,
    }
}

/// Of the API.
#[derive(Debug)]
pub struct ApiMetrics {
    /// Of the server.
    pub server: ServerMetrics,
    /// How many requests each route had, and how many of them were refused.
    routes: Vec<[Counter; 2]>,
}

impl Default for ApiMetrics {
    fn default() -> Self {
        let routes = ROUTES.iter().map(|_| Default::default()).collect();
        Self { server: ServerMetrics::default(), routes }
    }
}

impl ApiMetrics {
    /// Counts a request of the route at `index` of [`ROUTES`], or of none.
    pub fn asked(&self, index: Option<usize>) {
        match index.and_then(|index| self.routes.get(index)) {
            Some([asked, _]) => asked.count(),
            None => self.server.invalid_requests_count.count(),
        }
    }

    /// Counts that it was refused.
    pub fn refused(&self, index: Option<usize>) {
        if let Some([_, refused]) = index.and_then(|index| self.routes.get(index)) {
            refused.count();
        }
    }

    /// What was counted, a group for each method.
    pub fn groups(&self) -> Vec<Group> {
        let mut groups = vec![Group::of("api_server", &self.server)];
        for (family, method) in [
            ("get_api_requests", "GET"),
            ("put_api_requests", "PUT"),
            ("post_api_requests", "POST"),
            ("patch_api_requests", "PATCH"),
            ("delete_api_requests", "DELETE"),
        ] {
            let routes = ROUTES.iter().zip(&self.routes).filter(|(route, _)| route.method == method);
            let fields = routes.flat_map(|(route, [asked, refused])| {
                let (name, what) = (route.counted, format!("{method} {}", route.path));
                [
                    Field::new(format!("{name}_count"), format!("Requests {what}"), asked.read()),
                    Field::new(
                        format!("{name}_fails"),
                        format!("Requests {what} that were refused"),
                        refused.read(),
                    ),
                ]
            });
            groups.push(Group { family, member: None, fields: fields.collect() });
        }
        groups
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use cofferdam_metrics::Reading;

    use super::*;

    #[test]
    fn each_route_is_counted_by_a_name_of_its_own() {
        let metrics = ApiMetrics::default();
        for index in 0..ROUTES.len() {
            for _ in 0..=index {
                metrics.asked(Some(index));
            }
            metrics.refused(Some(index));
        }
        metrics.asked(None);
        metrics.refused(None);
        let groups = metrics.groups();
        let fields: Vec<_> = groups
            .iter()
            .skip(1)
            .flat_map(|group| {
                group.fields.iter().map(|field| (group.family, field.name.clone(), field.reading.clone()))
            })
            .collect();
        assert_eq!(fields.len(), 2 * ROUTES.len(), "a method has no group");
        let names: HashSet<_> = fields.iter().map(|(family, name, _)| (*family, name.clone())).collect();
        assert_eq!(names.len(), fields.len(), "a name is used twice");
        let drive =
            ROUTES.iter().position(|route| (route.method, route.counted) == ("PUT", "drive")).unwrap();
        let count = Reading::Counter(drive as u64 + 1);
        assert!(fields.contains(&("put_api_requests", "drive_count".into(), count)));
        assert!(fields.contains(&("put_api_requests", "drive_fails".into(), Reading::Counter(1))));
        assert_eq!(metrics.server.invalid_requests_count.total(), 1);
    }
}
