"""Where images are decoded."""

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prefect_ttapi.errors import PictureError
from prefect_ttapi.images.renditions import in_worker


def test_few_threads_decode_for_many():
    """Forty threads that want pixels have them from as many as there are processors, whatever the work raises."""

    @in_worker
    def damaged() -> None:
        raise PictureError("damaged")

    with ThreadPoolExecutor(40) as threads:
        at = set(threads.map(lambda _: in_worker(threading.get_ident)(), range(400)))
    assert len(at) <= (os.cpu_count() or 1)
    with pytest.raises(PictureError, match="damaged"):
        damaged()


def test_a_forked_process_decodes_as_well():
    """A child process, which has none of its parent's threads, does not wait for them."""
    script = """
        import os, signal
        from prefect_ttapi.images.renditions import in_worker
        process = in_worker(os.getpid)
        parent = process()
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if process() == os.getpid() != parent else 1)
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
