//! The domain tier: Linux guests, on hardware KVM or in the rig.
