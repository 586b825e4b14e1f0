//! Containers whose manifest the secure processor vouches for.

use cofferdam_api::status::Platform;
use cofferdam_tests::container::Container;

#[test]
fn the_manifest_is_compared_with_the_report() {
    let mut container = Container::new("cat /which; exit 5");
    container.platform = "snp";
    let ended = container.finish();
    assert_eq!(ended.text(), "highest\n", "{ended}");
    assert_eq!(ended.done.code(), 5, "{ended}");
    let outcome = ended.done.outcome();
    assert_eq!((outcome.platform, outcome.protected), (Some(Platform::Snp), true), "{ended}");

    let mut container = Container::new("cat /which");
    container.platform = "snp";
    container.bound = Some([1; 32]);
    let ended = container.finish();
    assert!(ended.was_refused("manifest: wrong_digest"), "{ended}");
    assert_eq!(ended.done.code(), 120, "{ended}");
}
