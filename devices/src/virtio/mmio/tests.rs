use event_manager::{EventManager, SubscriberOps};
use proptest::prelude::*;

use super::super::ActivateError;
use super::super::interrupt_status;
use super::super::testing::{Line, Ring, memory};
use super::*;

const MAX: [u16; 2] = [8, 16];
const FEATURE: u64 = 1 << 5;
const READY: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;

/// What the fake device has seen.
#[derive(Default)]
struct Seen {
    driver: Option<Driver>,
    activations: usize,
    failed_activations: usize,
    resets: usize,
    notified: Vec<u16>,
    /// Notified while it had no queues.
    dead_notifications: usize,
    config: [u8; 16],
    events: Vec<u32>,
}

/// A device with two queues, the first of which it needs.
struct Fake {
    seen: Arc<Mutex<Seen>>,
    own_event: EventFd,
}

impl VirtioDevice for Fake {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &MAX
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.seen.lock().unwrap().config;
        for (offset, byte) in (offset..).zip(data) {
            *byte = config.get(offset as usize).copied().unwrap_or(0);
        }
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut seen = self.seen.lock().unwrap();
        for (offset, byte) in (offset..).zip(data) {
            if let Some(place) = seen.config.get_mut(offset as usize) {
                *place = *byte;
            }
        }
    }
    fn activation_failed(&mut self) {
        self.seen.lock().unwrap().failed_activations += 1;
    }
    fn activate(&mut self, driver: Driver) -> Result<(), ActivateError> {
        let mut seen = self.seen.lock().unwrap();
        seen.activations += 1;
        if !virtio_queue::QueueT::ready(&driver.queues[0]) {
            return Err(ActivateError::QueueNotReady(0));
        }
        assert!(seen.driver.is_none(), "activated twice");
        seen.driver = Some(driver);
        Ok(())
    }
    fn reset(&mut self) {
        let mut seen = self.seen.lock().unwrap();
        seen.resets += 1;
        seen.driver = None;
    }
    fn notify(&mut self, queue: u16) {
        let mut seen = self.seen.lock().unwrap();
        seen.notified.push(queue);
        if seen.driver.as_ref().is_none_or(|driver| driver.interrupt.is_broken()) {
            seen.dead_notifications += 1;
        }
    }
    fn register(&mut self, ops: &mut EventOps) {
        ops.add(Events::with_data(&self.own_event, DEVICE_EVENTS + 3, EventSet::IN)).unwrap();
    }
    fn event(&mut self, event: Events, _ops: &mut EventOps) {
        self.own_event.read().unwrap();
        self.seen.lock().unwrap().events.push(event.data());
    }
}

struct Rig {
    transport: Arc<MmioTransport>,
    seen: Arc<Mutex<Seen>>,
    line: Arc<Line>,
    own_event: EventFd,
    ring: Ring,
    manager: EventManager<Arc<dyn EventSubscriber>>,
}

impl Rig {
    fn new() -> Self {
        let memory = memory(&[(0, 0x1_0000)]);
        let ring = Ring::new(&memory, 0x1000, 8);
        let seen = Arc::new(Mutex::new(Seen::default()));
        let line = Arc::new(Line::default());
        let own_event = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = Fake { seen: seen.clone(), own_event: own_event.try_clone().unwrap() };
        let transport = Arc::new(MmioTransport::new(Box::new(device), memory, None, line.clone()).unwrap());
        let mut manager = EventManager::<Arc<dyn EventSubscriber>>::new().unwrap();
        manager.add_subscriber(transport.clone());
        Self { transport, seen, line, own_event, ring, manager }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    fn get(&self, offset: u64) -> u32 {
        let mut data = [0xFF; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Runs the event loop until nothing is pending.
    fn run(&mut self) {
        while self.manager.run_with_timeout(0).unwrap() > 0 {}
    }

    /// Goes to `FEATURES_OK` with `features`.
    fn negotiate(&self, features: u64) {
        for step in [0, status::ACKNOWLEDGE, status::ACKNOWLEDGE | status::DRIVER] {
            self.set(STATUS, step);
        }
        for (select, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.set(DRIVER_FEATURES_SELECT, select);
            self.set(DRIVER_FEATURES, value);
        }
        self.set(STATUS, READY);
    }

    /// Describes queue 0 and makes it ready.
    fn set_up_queue(&self) {
        self.set(QUEUE_SELECT, 0);
        self.set(QUEUE_SIZE, 8);
        self.set(QUEUE_DESC_LOW, self.ring.table() as u32);
        self.set(QUEUE_DRIVER_LOW, self.ring.available() as u32);
        self.set(QUEUE_DEVICE_LOW, self.ring.used() as u32);
        self.set(QUEUE_READY, 1);
    }

    fn start(&self) {
        self.negotiate(TRANSPORT_FEATURES | FEATURE);
        self.set_up_queue();
        self.set(STATUS, READY | status::DRIVER_OK);
    }
}

#[test]
fn the_registers_introduce_the_device() {
    let rig = Rig::new();
    assert_eq!([rig.get(MAGIC_VALUE), rig.get(VERSION), rig.get(DEVICE_ID)], [0x7472_6976, 2, 42]);
    let mut features = [0; 3];
    for (select, half) in (0..).zip(&mut features) {
        rig.set(DEVICE_FEATURES_SELECT, select);
        *half = rig.get(DEVICE_FEATURES);
    }
    assert_eq!(features, [1 << 5 | 1 << 28 | 1 << 29, 1, 0]);
    for (select, max) in [(0, 8), (1, 16), (2, 0), (u32::MAX, 0)] {
        rig.set(QUEUE_SELECT, select);
        assert_eq!(rig.get(QUEUE_SIZE_MAX), max);
    }
    for offset in [0xB0, 0xB4, 0xB8, 0xBC] {
        assert_eq!(rig.get(offset), u32::MAX, "{offset:#x}");
    }
}

#[test]
fn odd_accesses_to_registers_read_zero_and_write_nothing() {
    let rig = Rig::new();
    for (offset, length) in [(0, 1), (0, 2), (0, 8), (1, 4), (2, 4), (0xFC, 8), (0xFE, 4), (0x48, 4)] {
        let mut data = vec![0xFF; length];
        rig.transport.read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0), "{offset:#x} {length}");
    }
    rig.transport.write(STATUS, &[1]);
    rig.transport.write(STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(rig.get(STATUS), 0);
    rig.set(MAGIC_VALUE, 0);
    assert_eq!(rig.get(MAGIC_VALUE), MAGIC);
}

#[test]
fn configuration_space_takes_any_width() {
    let rig = Rig::new();
    rig.transport.write(CONFIG, &[0xEE]);
    assert_eq!(rig.seen().config[0], 0, "written before there is a driver");
    rig.negotiate(TRANSPORT_FEATURES);
    rig.transport.write(CONFIG + 1, &[1, 2, 3, 4, 5, 6, 7, 8]);
    rig.transport.write(CONFIG + 15, &[9, 10]);
    for (offset, expected) in [
        (CONFIG, &[0u8, 1, 2, 3, 4, 5, 6, 7][..]),
        (CONFIG + 2, &[2]),
        (CONFIG + 3, &[3, 4]),
        (CONFIG + 5, &[5, 6, 7, 8]),
        (CONFIG + 15, &[9, 0]),
        (MMIO_SIZE - 4, &[0, 0, 0, 0]),
    ] {
        let mut data = vec![0xFF; expected.len()];
        rig.transport.read(offset, &mut data);
        assert_eq!(data, expected);
    }
}

#[test]
fn a_well_behaved_driver_gets_its_queues() {
    let mut rig = Rig::new();
    rig.start();
    assert_eq!(rig.get(STATUS), READY | status::DRIVER_OK);
    rig.run();
    assert_eq!(rig.seen().notified, [0, 1], "each once after activation");
    let interrupt = {
        let seen = rig.seen();
        let driver = seen.driver.as_ref().unwrap();
        assert_eq!(driver.features, TRANSPORT_FEATURES | FEATURE);
        assert_eq!(driver.queues[0], rig.ring.queue(true));
        assert!(!virtio_queue::QueueT::ready(&driver.queues[1]));
        driver.interrupt.clone()
    };
    interrupt.used();
    let changed = rig.transport.reconfigure(|device: &mut Fake| {
        device.seen.lock().unwrap().config[0] = 9;
        rig.get(CONFIG_GENERATION)
    });
    assert_eq!(changed, Some(1), "a driver that reads the new space reads the new generation after it");
    assert_eq!((rig.line.edges(), rig.get(CONFIG_GENERATION)), (2, 1));
    assert_eq!(rig.get(INTERRUPT_STATUS), interrupt_status::USED | interrupt_status::CONFIG);
    rig.set(INTERRUPT_ACK, interrupt_status::USED);
    assert_eq!(rig.get(INTERRUPT_STATUS), interrupt_status::CONFIG);
}

#[test]
fn a_device_is_reached_by_its_type_and_a_change_of_it_is_told_to_nobody_without_a_driver() {
    let rig = Rig::new();
    assert_eq!(rig.transport.with_device(|device: &mut Fake| device.device_type()), Some(42));
    assert_eq!(rig.transport.with_device(|_: &mut crate::virtio::block::Block| ()), None);
    assert_eq!(rig.transport.reconfigure(|_: &mut Fake| ()), Some(()));
    assert_eq!((rig.line.edges(), rig.get(INTERRUPT_STATUS), rig.get(CONFIG_GENERATION)), (0, 0, 1));
}

#[test]
fn an_interrupt_handler_waits_for_nobody() {
    let rig = Rig::new();
    let _device_at_work = rig.transport.state.lock().unwrap();
    rig.transport.interrupt.used();
    let (send, receive) = std::sync::mpsc::channel();
    let transport = rig.transport.clone();
    std::thread::spawn(move || {
        for offset in [INTERRUPT_STATUS, STATUS, CONFIG_GENERATION, MAGIC_VALUE] {
            transport.read(offset, &mut [0; 4]);
        }
        transport.write(INTERRUPT_ACK, &[1, 0, 0, 0]);
        transport.write(QUEUE_NOTIFY, &[1, 0, 0, 0]);
        send.send(()).unwrap();
    });
    assert!(receive.recv_timeout(std::time::Duration::from_secs(30)).is_ok(), "waits for the device");
    assert_eq!(rig.get(INTERRUPT_STATUS), 0);
}

#[test]
fn notifications_reach_a_live_device_only() {
    let mut rig = Rig::new();
    rig.set(QUEUE_NOTIFY, 0);
    rig.run();
    assert!(rig.seen().notified.is_empty());
    rig.start();
    rig.run();
    rig.seen().notified.clear();
    rig.set(QUEUE_NOTIFY, 1);
    rig.set(QUEUE_NOTIFY, 2);
    rig.set(QUEUE_NOTIFY, u32::MAX);
    rig.run();
    assert_eq!(rig.seen().notified, [1]);
    rig.set(QUEUE_NOTIFY, 1);
    rig.set(STATUS, 0);
    rig.run();
    assert_eq!(rig.seen().notified, [1], "after a reset");
    rig.start();
    rig.transport.interrupt.needs_reset(&"test");
    assert_eq!(rig.transport.metrics().needs_reset_count.total(), 1);
    rig.set(QUEUE_NOTIFY, 0);
    rig.run();
    assert_eq!(rig.seen().notified, [1], "of a broken device");
}

#[test]
fn the_devices_own_events_are_forwarded() {
    let mut rig = Rig::new();
    rig.own_event.write(1).unwrap();
    rig.run();
    assert_eq!(rig.seen().events, [DEVICE_EVENTS + 3]);
}

#[test]
fn status_steps_out_of_order_are_ignored() {
    let rig = Rig::new();
    for value in [
        status::DRIVER,
        status::FEATURES_OK,
        status::DRIVER_OK,
        status::DRIVER_OK | status::ACKNOWLEDGE,
        status::FEATURES_OK | status::ACKNOWLEDGE,
        status::ACKNOWLEDGE | 0x10,
        u32::MAX,
    ] {
        rig.set(STATUS, value);
        assert_eq!(rig.get(STATUS), 0, "{value:#x}");
    }
    let metrics = rig.transport.metrics();
    assert_eq!(metrics.ignored_writes_count.total(), 7);
    assert!(metrics.rate_limited_log_count.total() > 0, "lines are not limited");
    rig.negotiate(TRANSPORT_FEATURES);
    for value in [
        status::ACKNOWLEDGE,
        status::ACKNOWLEDGE | status::FAILED,
        READY & !status::ACKNOWLEDGE,
        READY & !status::FEATURES_OK,
        0x100,
    ] {
        rig.set(STATUS, value);
        assert_eq!(rig.get(STATUS), READY, "{value:#x}");
    }
    assert_eq!(rig.seen().activations, 0);
}

#[test]
fn features_that_cannot_be_are_not_accepted() {
    for features in [0, TRANSPORT_FEATURES & !(1 << 32), TRANSPORT_FEATURES | 1 << 6, u64::MAX] {
        let rig = Rig::new();
        rig.negotiate(features);
        assert_eq!(rig.get(STATUS), READY & !status::FEATURES_OK, "{features:#x}");
        rig.set(STATUS, READY | status::DRIVER_OK);
        assert_eq!(rig.get(STATUS) & status::DRIVER_OK, 0);
        rig.negotiate(1 << 32);
        assert_eq!(rig.get(STATUS), READY, "a second try");
    }
}

#[test]
fn features_are_written_in_their_time_only() {
    let rig = Rig::new();
    let write_all = || {
        for select in [0, 1, 2] {
            rig.set(DRIVER_FEATURES_SELECT, select);
            rig.set(DRIVER_FEATURES, u32::MAX);
        }
    };
    write_all();
    rig.set(STATUS, status::ACKNOWLEDGE);
    write_all();
    assert_eq!(rig.transport.lock().registers.features(), 0);
    rig.negotiate(TRANSPORT_FEATURES);
    write_all();
    assert_eq!(rig.transport.lock().registers.features(), TRANSPORT_FEATURES);
}

#[test]
fn queues_are_set_up_in_their_time_only() {
    let rig = Rig::new();
    let blank = rig.transport.lock().registers.selected().unwrap().clone();
    let same = |expected: &QueueRegisters| {
        let state = rig.transport.lock();
        assert_eq!(format!("{:?}", state.registers.selected().unwrap()), format!("{expected:?}"));
    };
    rig.set_up_queue();
    same(&blank);
    rig.negotiate(TRANSPORT_FEATURES);
    rig.set_up_queue();
    let ready = rig.transport.lock().registers.selected().unwrap().clone();
    assert!(ready.ready);
    for offset in [
        QUEUE_SIZE,
        QUEUE_DESC_LOW,
        QUEUE_DESC_HIGH,
        QUEUE_DRIVER_LOW,
        QUEUE_DRIVER_HIGH,
        QUEUE_DEVICE_LOW,
        QUEUE_DEVICE_HIGH,
    ] {
        rig.set(offset, 4);
    }
    rig.set(QUEUE_READY, 2);
    same(&ready);
    rig.set(QUEUE_READY, 0);
    rig.set(QUEUE_DESC_HIGH, 1);
    assert_eq!(rig.transport.lock().registers.selected().unwrap().descriptors, 1 << 32 | rig.ring.table());
    rig.set(QUEUE_DESC_HIGH, 0);
    rig.set(QUEUE_READY, 1);
    rig.set(STATUS, READY | status::DRIVER_OK);
    rig.set(QUEUE_READY, 0);
    same(&ready);
    rig.set(STATUS, 0);
    same(&blank);
    rig.set(QUEUE_SELECT, 2);
    rig.set(QUEUE_READY, 1);
    assert_eq!(rig.get(QUEUE_READY), 0);
}

#[test]
fn queues_that_cannot_work_need_a_reset() {
    let rig = Rig::new();
    let cases = [
        (QUEUE_SIZE, 0),
        (QUEUE_SIZE, 3),
        (QUEUE_SIZE, 16),
        (QUEUE_SIZE, 0x1_0008),
        (QUEUE_SIZE, u32::MAX),
        (QUEUE_DESC_LOW, 0x1008),
        (QUEUE_DRIVER_LOW, 0x2001),
        (QUEUE_DEVICE_LOW, 0x3002),
        (QUEUE_DESC_LOW, 0xFF90),
        (QUEUE_DRIVER_LOW, 0xFFF0),
        (QUEUE_DEVICE_LOW, 0xFFC0),
        (QUEUE_DESC_HIGH, 1),
        (QUEUE_DRIVER_HIGH, u32::MAX),
        (QUEUE_DEVICE_HIGH, u32::MAX),
        (QUEUE_DEVICE_LOW, 0xFFFF_FFFC),
    ];
    for (case, (offset, value)) in (1..).zip(cases) {
        rig.negotiate(TRANSPORT_FEATURES);
        rig.set_up_queue();
        rig.set(QUEUE_READY, 0);
        rig.set(offset, value);
        rig.set(QUEUE_READY, 1);
        rig.set(STATUS, READY | status::DRIVER_OK);
        let expected = READY | status::DRIVER_OK | status::NEEDS_RESET;
        assert_eq!(rig.get(STATUS), expected, "{offset:#x} {value:#x}");
        assert_eq!((rig.line.edges(), rig.get(INTERRUPT_STATUS)), (case, interrupt_status::CONFIG));
        rig.set(QUEUE_READY, 0);
        assert_eq!(rig.get(QUEUE_READY), 1, "set-up goes on in spite of needs reset");
    }
    assert_eq!(rig.seen().activations, 0);
    rig.start();
    assert_eq!(rig.get(STATUS), READY | status::DRIVER_OK);
}

#[test]
fn a_device_that_refuses_to_start_needs_a_reset() {
    let mut rig = Rig::new();
    rig.negotiate(TRANSPORT_FEATURES);
    rig.set(STATUS, READY | status::DRIVER_OK);
    assert_eq!(rig.get(STATUS), READY | status::DRIVER_OK | status::NEEDS_RESET);
    rig.set(QUEUE_NOTIFY, 0);
    rig.run();
    assert_eq!(rig.seen().activations, 1);
    assert_eq!(rig.seen().failed_activations, 1);
    assert!(rig.seen().notified.is_empty());
}

#[test]
fn a_failed_driver_cannot_start_the_device() {
    let rig = Rig::new();
    rig.negotiate(TRANSPORT_FEATURES);
    rig.set_up_queue();
    rig.set(STATUS, READY | status::FAILED);
    rig.set(STATUS, READY | status::FAILED | status::DRIVER_OK);
    assert_eq!((rig.get(STATUS), rig.seen().activations), (READY | status::FAILED, 0));
}

#[test]
fn a_reset_takes_everything_back() {
    let mut rig = Rig::new();
    rig.start();
    rig.transport.interrupt.used();
    rig.set(STATUS, 0);
    rig.run();
    assert!(rig.seen().driver.is_none());
    assert_eq!(rig.seen().resets, 2);
    assert!(rig.seen().notified.is_empty());
    assert_eq!((rig.get(STATUS), rig.get(INTERRUPT_STATUS), rig.get(QUEUE_READY)), (0, 0, 0));
    assert_eq!(rig.transport.lock().registers.features(), 0);
    rig.start();
    assert!(rig.seen().driver.is_some());
}

#[test]
fn a_device_that_was_shut_down_stays_down() {
    let mut rig = Rig::new();
    rig.start();
    rig.transport.shut_down();
    assert!(rig.seen().driver.is_none());
    rig.start();
    rig.set(QUEUE_NOTIFY, 0);
    rig.run();
    assert!(rig.seen().driver.is_none());
    assert_eq!((rig.get(STATUS), rig.seen().notified.len()), (0, 0));
}

#[test]
fn a_panicked_thread_does_not_take_the_others_along() {
    let rig = Rig::new();
    let transport = rig.transport.clone();
    let panicked = std::thread::spawn(move || {
        let _state = transport.state.lock();
        panic!("with the lock held");
    });
    assert!(panicked.join().is_err());
    rig.start();
    assert_eq!(rig.get(STATUS), READY | status::DRIVER_OK);
}

#[test]
fn impossible_devices_are_refused() {
    struct Bad(Vec<u16>);
    impl VirtioDevice for Bad {
        fn device_type(&self) -> u32 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &self.0
        }
        fn features(&self) -> u64 {
            0
        }
        fn read_config(&self, _: u64, _: &mut [u8]) {}
        fn activate(&mut self, _: Driver) -> Result<(), ActivateError> {
            Ok(())
        }
        fn reset(&mut self) {}
        fn notify(&mut self, _: u16) {}
        fn register(&mut self, _: &mut EventOps) {}
        fn event(&mut self, _: Events, _: &mut EventOps) {}
    }
    for sizes in [vec![0], vec![8, 7], vec![1; 257]] {
        let new =
            MmioTransport::new(Box::new(Bad(sizes)), memory(&[(0, 0x1000)]), None, Arc::new(Line::default()));
        assert_eq!(new.err().unwrap().kind(), io::ErrorKind::InvalidInput);
    }
}

/// One access of a hostile driver; what it hits is biased to what matters.
#[derive(Clone, Debug)]
enum Access {
    Register(u64, u32),
    Raw(u64, Vec<u8>),
    Read(u64, usize),
    Negotiate(u64),
    SetUpQueue,
    Run,
}

fn accesses() -> impl Strategy<Value = Vec<Access>> {
    let register = prop_oneof![
        6 => Just(STATUS),
        4 => Just(QUEUE_READY),
        2 => Just(QUEUE_NOTIFY),
        6 => (0u64..0x40).prop_map(|word| word * 4),
    ];
    let value = prop_oneof![
        4 => prop_oneof![Just(1), Just(3), Just(11), Just(15), Just(0x8F), Just(0x4F)],
        2 => 0u32..32,
        2 => (0u32..0x12).prop_map(|page| page * 0x1000),
        1 => any::<u32>(),
    ];
    let access = prop_oneof![
        8 => (register, value).prop_map(|(offset, value)| Access::Register(offset, value)),
        2 => (0..MMIO_SIZE, proptest::collection::vec(any::<u8>(), 1..9))
            .prop_map(|(offset, data)| Access::Raw(offset, data)),
        2 => (0..MMIO_SIZE, 1usize..9).prop_map(|(offset, length)| Access::Read(offset, length)),
        2 => prop_oneof![Just(TRANSPORT_FEATURES), Just(1 << 32), any::<u64>()].prop_map(Access::Negotiate),
        2 => Just(Access::SetUpQueue),
        2 => Just(Access::Run),
    ];
    proptest::collection::vec(access, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a driver writes in whatever order: the device is live exactly from a good `DRIVER_OK` to the
    /// next reset, is notified only then, and its queues lie in memory.
    #[test]
    fn the_device_is_live_only_when_it_may_be(accesses in accesses()) {
        let mut rig = Rig::new();
        for access in accesses {
            match access {
                Access::Register(offset, value) => rig.set(offset, value),
                Access::Raw(offset, data) => rig.transport.write(offset, &data),
                Access::Read(offset, length) => rig.transport.read(offset, &mut vec![0xFF; length]),
                Access::Negotiate(features) => rig.negotiate(features),
                Access::SetUpQueue => rig.set_up_queue(),
                Access::Run => rig.run(),
            }
            let seen = rig.seen();
            let current = rig.get(STATUS);
            let good = current & (READY | status::DRIVER_OK | status::NEEDS_RESET) == READY | status::DRIVER_OK;
            prop_assert_eq!(seen.driver.is_some(), good, "status {:#x}", current);
            prop_assert_eq!(seen.dead_notifications, 0);
            if let Some(driver) = &seen.driver {
                prop_assert_eq!(driver.features & !(TRANSPORT_FEATURES | FEATURE), 0);
                prop_assert!(driver.features & 1 << 32 != 0);
                for queue in driver.queues.iter().filter(|queue| virtio_queue::QueueT::ready(*queue)) {
                    prop_assert!(virtio_queue::QueueT::is_valid(queue, &*driver.memory));
                }
            }
        }
    }
}

struct NothingShared;

impl SharedPages for NothingShared {
    fn is_shared(&self, _address: u64, _length: u64) -> bool {
        false
    }
}

#[test]
fn a_driver_must_know_that_memory_is_private() {
    use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
    let accepted = |shared: Option<Arc<dyn SharedPages>>, features: u64| {
        let mut rig = Rig::new();
        let device = Fake { seen: rig.seen.clone(), own_event: rig.own_event.try_clone().unwrap() };
        let memory = memory(&[(0, 0x1_0000)]);
        let transport = MmioTransport::new(Box::new(device), memory, shared, rig.line.clone()).unwrap();
        rig.transport = Arc::new(transport);
        rig.negotiate(features);
        rig.get(STATUS) & status::FEATURES_OK != 0
    };
    let (old, new) = (1 << VIRTIO_F_VERSION_1, 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM);
    let private = || Some(Arc::new(NothingShared) as _);
    assert!(accepted(private(), new) && !accepted(private(), old));
    assert!(accepted(None, old) && !accepted(None, new), "where all is shared it is not even offered");
}
