"""Eight CPU devices, and seeded property tests."""

import jax, hypothesis

jax.config.update("jax_num_cpu_devices", 8)
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=50
)
hypothesis.settings.load_profile("ci")
