"""One process alone; several are in the tests of train and of scripts."""

import pytest

from jaxplan.core.processes import agree, any_process, are_many, first_alone, is_first


@pytest.mark.parametrize(
    ("environment", "many"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8"}, False),  # a batch script before its srun
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t0"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1"}, True),
        ({"JAXPLAN_DISTRIBUTED": "0"}, False),
        ({"JAXPLAN_DISTRIBUTED": "1"}, True),
    ],
)
def test_the_environment_tells_of_other_processes(environment, many):
    assert are_many(environment) is many


def test_alone_everything_is_agreed_on():
    assert is_first()
    assert agree(3) == 3
    assert any_process(True)
    assert not any_process(False)


def test_the_first_process_works_and_its_error_is_its_own():
    assert first_alone(lambda: 3) == 3
    with pytest.raises(KeyError, match="lost"):
        first_alone(lambda: {}["lost"])
