"""Whatever fails, each client ends with exactly what was committed for it.

A run (`drill`) is a database, two or three nodes as real processes, clients that keep to the
protocol, and backends. What happens in it is a `plan`: a pure function of a seed. At the end all
faults are healed, and the `checker` compares what each client has with the table.

    make faults SEEDS=200 FIRST=1        many seeds; `make test` runs ten
    python -m tests.faults.mutants       switches each protection off, and sees it missed
    python -m tests.faults.million       a million notifications, and nodes that are killed

Environment: FAULTS_SEEDS, FAULTS_FIRST, FAULTS_SECONDS (of operations in a run), FAULTS_INTENSITY,
FAULTS_WITHOUT (kinds of operations), FAULTS_DEADLINE, FAULTS_SHRINK_SECONDS, FAULTS_REPORT (JSON).
"""
