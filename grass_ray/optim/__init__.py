"""HOW layers are updated: LayerwiseAdamW and the host store of optimizer states. Needs torch only."""
