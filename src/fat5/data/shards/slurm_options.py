"""How to ask Slurm for tasks. Apart from the executor, so that a command line can be read without datatrove."""

from dataclasses import dataclass


@dataclass
class SlurmOptions:
    """How to ask Slurm for tasks.

    Args:
        partition: partition to submit to.
        time: time limit of one task.
        qos: quality of service.
        memory_gb: memory of one task.
        max_array_size: the cluster's limit on the size of a job array.
        environment: shell command that activates the Python environment, if the submitting one is not inherited.
    """

    partition: str = ""
    time: str = "24:00:00"
    qos: str = "normal"
    memory_gb: int = 4
    max_array_size: int = 1001
    environment: str = ""
