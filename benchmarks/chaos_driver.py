"""The driver of a run under chaos: `launch.py` itself, whose fleet can be held between two steps.

  python -m benchmarks.chaos_driver GATE train RECIPE [section.key=value ...]

The folder GATE tells both ways: `until` holds the step that is not to be finished yet, by whoever
does the harm; `up` how many replicas there are, by this process. A held step's probes are
evaluated again and again, so harm finds calls on their way; each time they must give the same.
"""

import faulthandler
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import launch
from orchestrator import actors, fleets
from orchestrator.dispatch import Limits
from orchestrator.records import Probe, ProbeLoss
from orchestrator.run_folder import Run

# A replica that hangs is to be found in seconds, not minutes; loading may take long under load.
LIMITS = Limits(deadline_floor_s=4.0, first_call_s=120.0)
PAUSE_S = 0.4  # between two evaluations of a held step's probes


class HeldFleet(actors.ActorFleet):
    """Actors, whose answers are kept back while the step is held."""

    gate: Path

    def evaluate(self, probes: Sequence[Probe]) -> list[ProbeLoss]:
        answers = super().evaluate(probes)
        while probes[0].step >= int((self.gate / "until").read_text()):
            (self.gate / "up.new").write_text(str(len(self.digests())))
            (self.gate / "up.new").replace(self.gate / "up")
            time.sleep(PAUSE_S)
            again = super().evaluate(probes)
            assert [each.value for each in again] == [each.value for each in answers]
        return answers


def main() -> int:
    gate = Path(sys.argv.pop(1))
    faulthandler.register(signal.SIGUSR1, file=(gate / "stacks").open("a"))

    def make(run: Run, log: Path, say: Callable[[str], None]) -> HeldFleet:
        fleet = HeldFleet(run.config, log, say, LIMITS, run.pieces)
        fleet.gate = gate
        return fleet

    fleets._make_fleet = make
    return launch.main()


if __name__ == "__main__":
    sys.exit(main())
