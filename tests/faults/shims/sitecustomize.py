"""One worker that raises, once: put in front of PYTHONPATH by tests/faults, and by nothing else.

The file that WATCHTOWER_RAISES names says at which step rank 1 raises; it is removed first, so that the worker that
takes its place does not.
"""

import importlib.abc
import importlib.machinery
import os
import sys


class _WrapsTheStep(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "trainer.loop":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_wrap(module):
            execute(module)
            step = module._step

            def raises_once(running, batch, lookup, upcoming, position):
                note = os.environ["WATCHTOWER_RAISES"]
                if running.workers.rank == 1 and os.path.exists(note):
                    with open(note) as file:
                        at = int(file.read())
                    if position.global_step >= at:
                        os.remove(note)
                        raise RuntimeError("rank 1 raises")
                return step(running, batch, lookup, upcoming, position)

            module._step = raises_once

        spec.loader.exec_module = execute_and_wrap
        return spec


if "WATCHTOWER_RAISES" in os.environ:
    sys.meta_path.insert(0, _WrapsTheStep())
