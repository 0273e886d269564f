"""Lines of our own code in a log that several processes, and libraries, write to at once."""

import json
import subprocess
import sys
from pathlib import Path

NUM_PROCESSES, NUM_RECORDS = 4, 300
WRITER = f"""
import logging, sys
from pathlib import Path
from orchestrator import output, run_log

output.divert(Path(sys.argv[1]))
run_log.note(run="demo", replica=int(sys.argv[2]))
run_log.begin()
run_log.begin()  # twice is once
logger = logging.getLogger("orchestrator.actors")
for index in range({NUM_RECORDS}):
    run_log.note(step=index)
    print(f"loading {{index}} of many ...", end="\\r", file=sys.stderr, flush=True)
    logger.info("%s %s", "é" * 40, index)
    logger.debug("not told")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("this replica: bad")
logging.getLogger("sglang").warning("of others, as it is")
"""


def test_lines_stay_whole_and_tell_run_replica_and_step(tmp_path: Path) -> None:
    """Beside progress bars, which leave their own lines open."""
    log = tmp_path / "log.txt"
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(log), str(replica)])
        for replica in range(NUM_PROCESSES)
    ]
    assert [writer.wait(60) for writer in writers] == [0] * NUM_PROCESSES
    text = log.read_bytes().decode()
    lines = [line for line in text.split("\n") if line.startswith("{")]
    records = [json.loads(line) for line in lines]
    assert len(records) == NUM_PROCESSES * (NUM_RECORDS + 1)
    for replica in range(NUM_PROCESSES):
        ours = [record for record in records if record["replica"] == replica]
        assert [record["step"] for record in ours[:-1]] == list(range(NUM_RECORDS))
        assert ours[7]["message"] == "é" * 40 + " 7"
        assert {record["run"] for record in ours} == {"demo"}
        assert len({record["process"] for record in ours}) == 1
        assert (ours[-1]["level"], ours[-1]["module"]) == ("error", "actors")
        assert "ZeroDivisionError" in ours[-1]["traceback"]
    times = [record["time"] for record in records]
    assert all(time.endswith("Z") and time[10] == "T" for time in times)
    assert "of others, as it is" in text and "not told" not in text
    assert text.count("loading 299 of many ...") == NUM_PROCESSES
