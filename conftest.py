"""What has to be so before any test, and with it Prefect, is imported."""

import os
import signal
import tempfile

# Prefect makes its home when it is imported, reads its profile there, and a later version upgrades its database
_home = tempfile.TemporaryDirectory(prefix="prefect-home-")
os.environ["PREFECT_HOME"] = _home.name

# who starts the tests with nohup or in a script's background has SIGINT ignored here, and so in every child
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
