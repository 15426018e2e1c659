"""launch/preprocess.sbatch, run by bash with stand-ins."""


def test_preprocess_reads_env_sh(cluster):
    """The container that it names starts the program."""
    container = cluster.folder / "bin" / "apptainer"
    container.write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> "$SCRATCH/apptainer.log"\n')
    container.chmod(0o755)
    own = cluster.folder / "own_env.sh"
    own.write_text('SLM_CONTAINER=(apptainer exec)\nsource "$SLM_ROOT/launch/env.sh"\n')
    code, output = cluster.run(
        "preprocess.sbatch",
        work="0",
        SLM_ENV=str(own),
        SLM_INPUT="text/*.jsonl",
        SLM_TOKENIZER="vocabulary.model",
        SLM_OUTPUT="data/corpus",
        SLURM_ARRAY_TASK_ID="3",
        SLURM_ARRAY_TASK_COUNT="8",
    )
    assert code == 0, output
    assert cluster.log("apptainer") == [
        "exec python -m data_tools.preprocess --input text/*.jsonl --tokenizer vocabulary.model "
        "--output-prefix data/corpus --shard 3/8 --workers 64"
    ]
