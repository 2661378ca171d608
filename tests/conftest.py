"""What all tests share."""

from hypothesis import settings

# a busy machine is slow: no test is to fail for that
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
