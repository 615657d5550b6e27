"""The model IR and its executors: recorded once by models/, run every step by the core, or by torch as the oracle."""
