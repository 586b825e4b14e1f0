//! An interrupt by `KVM_SIGNAL_MSI`, which `vmm/src/board.rs` uses, against one by an irqfd; and what an irqfd costs
//! before its first interrupt. The vCPU does not run, and its local APIC is as reset leaves it: what is measured is
//! the way to it.

#![allow(clippy::expect_used)] // a benchmark that meets the unexpected ends

use criterion::{Criterion, criterion_group, criterion_main};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_enable_cap, kvm_irq_routing_entry, kvm_msi,
};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// To the local APIC with id 0, vector 0x30, edge.
const ADDRESS: u32 = 0xFEE0_0000;
const DATA: u32 = 0x30;
const PIN: u32 = 24;

fn vm() -> VmFd {
    let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).expect("KVM is there");
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args = [24, 0, 0, 0];
    vm.enable_cap(&split).expect("a split irqchip");
    vm
}

fn route(vm: &VmFd) {
    let mut entry = kvm_irq_routing_entry { gsi: PIN, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = ADDRESS;
    entry.u.msi.data = DATA;
    let routing = KvmIrqRouting::from_entries(&[entry]).expect("one entry");
    vm.set_gsi_routing(&routing).expect("a route");
}

fn interrupts(criterion: &mut Criterion) {
    let vm = vm();
    let _vcpu = vm.create_vcpu(0).expect("a vCPU");
    let message = kvm_msi { address_lo: ADDRESS, data: DATA, ..Default::default() };
    criterion.bench_function("KVM_SIGNAL_MSI", |bencher| bencher.iter(|| vm.signal_msi(message)));
    route(&vm);
    let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
    vm.register_irqfd(&event, PIN).expect("an irqfd");
    criterion.bench_function("write to an irqfd", |bencher| bencher.iter(|| event.write(1)));
    criterion.bench_function("KVM_SET_GSI_ROUTING of one route", |bencher| bencher.iter(|| route(&vm)));
    criterion.bench_function("set-up and removal of an irqfd", |bencher| {
        bencher.iter(|| {
            let event = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
            vm.register_irqfd(&event, PIN + 1).expect("an irqfd");
            vm.unregister_irqfd(&event, PIN + 1).expect("an irqfd");
        });
    });
}

criterion_group!(benches, interrupts);
criterion_main!(benches);
