"""Plain torch, any float dtype and device: the definition of each kernel."""
