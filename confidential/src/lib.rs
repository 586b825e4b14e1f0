//! Protection platforms of a domain.
