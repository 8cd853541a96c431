"""Two processes that run the same program, on this machine, as a cluster would."""

import os
import socket
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def start_two(command: list[str], devices: int) -> list[subprocess.Popen]:
    """Start both, with so many pretended devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ
            | {
                "PYTHONPATH": str(REPOSITORY),
                "JAX_NUM_CPU_DEVICES": str(devices),
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(number),
            },
        )
        for number in range(2)
    ]


def finish(processes: list[subprocess.Popen], expected: int) -> list[str]:
    """Wait for both, and see how they ended.

    Returns:
        What each of them told; what the library between them tells is left out.
    """
    told = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [expected] * 2, told
    return [
        "".join(line for line in text.splitlines(True) if not line.startswith("[Gloo]"))
        for text in told
    ]
