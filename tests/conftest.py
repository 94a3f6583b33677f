"""Settings of every suite: hypothesis repeats the same examples, and both frameworks may share one process."""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("JAX_PLATFORMS", "cpu") if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else None

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    pass
else:
    # deadline: a first example compiles. derandomize: a failure is everybody's failure.
    settings.register_profile("moebius", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("moebius")
