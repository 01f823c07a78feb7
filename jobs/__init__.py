"""One module per SLURM job: what it needs, ``build()`` and ``publish()``; no loop, no signal, no science.

Under ``python -m jobs.<job>`` this file runs before anything else of ours, so the signals are noted from here on: one
that arrives while torch is imported must not end the job by its default action.
"""

import sys

if sys.argv[0] == "-m":
    from tribunal.cluster import preemption

    preemption.install()
