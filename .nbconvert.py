# How README's Run line executes the notebook: its prints also appear in the terminal, at once
import os

c = get_config()  # noqa: F821
c.ExecutePreprocessor.extra_arguments = [
    "--IPKernelApp.quiet=False",
    "--IPKernelApp.log_level=CRITICAL",  # not ERROR: shutting down interrupts an idle kernel
]
c.ExecutePreprocessor.record_timing = False
os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # or the kernel warns about frozen modules
os.environ.setdefault("PYTHONIOENCODING", ":backslashreplace")  # a terminal may know no accents
