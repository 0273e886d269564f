"""SGLang's own server, on a machine without a GPU: nothing of ours but what lets it start there.

`python serve.py ARGUMENTS` is `python -m sglang.launch_server ARGUMENTS`. The server's worker
processes import this file again, so the patches stand outside of the condition.
"""

import runpy
import sys

from orchestrator import dist_patch

if "cpu" in sys.argv:
    dist_patch.use_cpu_engine()
    dist_patch.stand_in_for_sgl_kernel()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=False)
