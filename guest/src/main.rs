//! `cofferdam-init`: see the library.

fn main() {
    cofferdam_guest::boot::run();
}
