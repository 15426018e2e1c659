#!/usr/bin/env bash
# The whole of Selective Language Modeling on this machine, from raw text to a report, with real
# megatron-core processes:
#
#   bash launch/quickstart.sh                 7 to 12 minutes on 2 CPU cores, after the downloads
#   bash launch/quickstart.sh --quick         the same in 2 to 3 minutes, on less text (too short to compare the arms)
#   bash launch/quickstart.sh --corpus my.jsonl --curated good.jsonl      your own text, one {"text": ...} per line
#
# --folder DIR          where everything goes (default runs/quickstart of the checkout, runs/quickstart_quick with --quick)
# --text-bytes BYTES    how much of the standard library is read, spread over all of it by hash (default 5500000; 0 = all,
#                       which takes longer: the reference scores every token)
#
# Text -> tokenizer -> indexed binary -> base model -> reference -> scores -> three arms (plain, SLM
# 0.6, random 0.6) that continue from the same base, over the same data in the same order -> Hugging
# Face export -> report. Run it again after an interruption: finished stages are kept, training
# resumes from its last checkpoint. With other text or options in the same folder, what depends on
# them is made again, and what was there before is moved to earlier_1, earlier_2, ... in the folder.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
quick=no corpus='' curated='' folder='' text_bytes=''
absolute() { case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=yes ;;
        --corpus | --curated | --folder) # seen from where the caller stands, not from the checkout
            [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
            declare "${1#--}=$(absolute "$2")"; shift ;;
        --text-bytes)
            [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
            text_bytes=$2; shift ;;
        -h | --help) sed -n '2,${/^#/!q; s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "quickstart: unknown option $1; try --help" >&2; exit 2 ;;
    esac
    shift
done
cd "$ROOT"
[ -z "$corpus$curated" ] || { [ -n "$corpus" ] && [ -n "$curated" ]; } || { echo "quickstart: --corpus and --curated go together" >&2; exit 2; }
for file in "$corpus" "$curated"; do
    [ -z "$file" ] || [ -f "$file" ] || { echo "quickstart: $file: no such file" >&2; exit 2; }
done
[ -n "$folder" ] || { folder=$ROOT/runs/quickstart; [ "$quick" = no ] || folder=$ROOT/runs/quickstart_quick; }
source launch/venv.sh
source launch/slurm.sh

settings=(--folder "$folder")
if [ "$quick" = yes ]; then
    text_bytes=${text_bytes:-1000000}
    settings+=(--tokenizer.vocabulary_size 2000 --training.settings.monitoring '{validation_interval_steps: 10, validation_batches: 2}'
        --runs.base.settings.schedule.train_steps 10)
    for run in reference plain slm random; do settings+=("--runs.$run.settings.schedule.train_steps" 20); done
fi
quoted() { printf "'%s'" "${1//\'/\'\'}"; } # a path inside YAML
if [ -n "$corpus" ]; then
    # Every sixth curated document is the target domain.
    settings+=(--text.command '[]' --tokenizer.input "[$(quoted "$corpus")]" --training.validation '{target: curated_held_out}'
        --corpora "{corpus: {input: [$(quoted "$corpus")], workers: 2, verify: true},
                    curated: {input: [$(quoted "$curated")], workers: 2, held_out_fraction: 0.16}}"
        --runs.reference.train '[curated_train]' --exports.huggingface.check_on curated_held_out)
else
    settings+=(--text.command "[python, launch/stdlib_corpus.py, --output-folder, '{folder}/text', --max-bytes, '${text_bytes:-5500000}']")
fi
# One thread per process: two processes of one thread each beat one of two, and leave nothing to
# spin.
export OMP_NUM_THREADS=1 WANDB_SILENT=true
started=$SECONDS

child=
stop() {
    SLM_INTERRUPTED=yes
    [ -n "$child" ] || exit 85
    kill -TERM "$child" 2>/dev/null || true
}
trap stop INT TERM HUP USR1
trap '' PIPE
# A session of its own: the terminal's signals reach this script alone, which passes on a request to stop.
setsid python -m megatron_slm.submit --local --config launch/pipelines/quickstart.yaml "${settings[@]}" &
child=$!
slm_wait "$child"
[ "$SLM_EXIT_CODE" -eq 0 ] || exit "$SLM_EXIT_CODE"

cat <<END

Finished in $((SECONDS - started)) seconds. Everything is in $folder:
  report.html                     loss of the three arms, what was selected, a page of text with the selected tokens marked
  plain/ slm/ random/             run folders: metrics.jsonl, config.yaml, checkpoints/, wandb/ (wandb sync $folder/slm/wandb/offline-run-*)
  scores/                         the reference's loss of every token of the corpus
  huggingface/                    the SLM model for transformers: AutoModelForCausalLM.from_pretrained("$folder/huggingface")
  corpus.bin corpus.idx           the indexed binary; tokenizer.model its vocabulary
  pipeline/                       the description that was run, and the complete settings of every run
END
