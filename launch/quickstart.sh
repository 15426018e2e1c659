#!/usr/bin/env bash
# The whole of Selective Language Modeling on this machine, from raw text to a report, with real megatron-core processes:
#
#   bash launch/quickstart.sh                 7 to 12 minutes on 2 CPU cores, after the downloads
#   bash launch/quickstart.sh --quick         the same in 2 to 3 minutes, on less text (too short to compare the arms)
#   bash launch/quickstart.sh --corpus my.jsonl --curated good.jsonl      your own text, one {"text": ...} per line
#
# --folder DIR          where everything goes (default runs/quickstart of the checkout, runs/quickstart_quick with --quick)
# --text-bytes BYTES    how much of the standard library is read, spread over all of it by hash (default 5500000; 0 = all,
#                       which takes longer: the reference scores every token)
#
# Text -> tokenizer -> indexed binary -> base model -> reference -> scores -> three arms (plain, SLM 0.6, random 0.6) that continue
# from the same base, over the same data in the same order -> Hugging Face export -> report. Run it again after an interruption:
# finished stages are kept, training resumes from its last checkpoint. With other text or options in the same folder, what depends on
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
        -h | --help) sed -n '2,16s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
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
source launch/stages.sh

if [ "$quick" = yes ]; then
    vocabulary=2000 base_steps=10 reference_steps=20 arm_steps=20 validate=10 validation_batches=2
    text_bytes=${text_bytes:-1000000}
else
    vocabulary=4000 base_steps=100 reference_steps=240 arm_steps=120 validate=30 validation_batches=12
    text_bytes=${text_bytes:-5500000}
fi
# One thread per process: two processes of one thread each beat one of two, and leave nothing to spin.
export OMP_NUM_THREADS=1 WANDB_SILENT=true
processes=2
mkdir -p "$folder"
started=$SECONDS

trap 'echo "stopping" >&2 || true; stage_stop' INT TERM HUP USR1
trap '' PIPE

stage() { printf '\n\033[1m[%3ds] %s\033[0m\n' "$((SECONDS - started))" "$1"; }
quoted() { printf "'%s'" "${1//\'/\'\'}"; } # a path inside YAML
train() { # STAGE of its run folder, STEPS, [--after STAGE]..., --, more overrides
    local run=$1 steps=$2 after=()
    shift 2
    while [ "$1" != -- ]; do after+=("$1"); shift; done
    shift
    once "$run" --makes "$run" --reads launch/recipes/quickstart.yaml --after tokenizer --after "$held_out_stage" "${after[@]}" -- \
        bash launch/local.sh "$processes" train --config launch/recipes/quickstart.yaml \
        --run.folder "$folder/$run" --schedule.train_steps "$steps" --monitoring.validation_interval_steps "$validate" \
        --monitoring.validation_batches "$validation_batches" --data.tokenizer "$folder/tokenizer.model" \
        --data.validation "[{name: target, corpus: $(quoted "$held_out_corpus")}]" "$@"
}

stage "Text"
if [ -z "$corpus" ]; then
    once text --makes text --reads launch/stdlib_corpus.py -- python launch/stdlib_corpus.py --output-folder "$folder/text" --max-bytes "$text_bytes"
    corpus=$folder/text/corpus.jsonl curated=$folder/text/curated.jsonl held_out=$folder/text/held_out.jsonl
else
    echo "$corpus, $curated"
fi

stage "Tokenizer: SentencePiece, $vocabulary pieces"
once tokenizer --makes 'tokenizer.*' --reads "$corpus" -- \
    python -m tokenizer.train --input "$corpus" --output-prefix "$folder/tokenizer" --vocab-size "$vocabulary" --sample-bytes 8000000

stage "Preprocess: text to indexed binary"
preprocess() { # NAME of the stage and of its corpus, TEXT
    once "$1" --makes "$1.*" --reads "$2" --after tokenizer -- \
        python -m data_tools.preprocess --input "$2" --tokenizer "$folder/tokenizer.model" --output-prefix "$folder/$1" --workers 2
}
preprocess corpus "$corpus"
if [ -n "${held_out:-}" ]; then
    preprocess curated "$curated"
    preprocess held_out "$held_out"
    curated_corpus=$folder/curated held_out_corpus=$folder/held_out held_out_stage=held_out
else
    preprocess all_curated "$curated"
    # Every sixth curated document is the target domain.
    once curated --makes 'curated[._]*' --makes 'held_out.*' --after all_curated -- \
        python -m data_tools.split "$folder/all_curated" --held-out-fraction 0.16 --output-prefix "$folder/curated"
    curated_corpus=$folder/curated_train held_out_corpus=$folder/curated_held_out held_out_stage=curated
fi
once verify --after corpus -- python -m data_tools.verify "$folder/corpus"

stage "Base model: $base_steps plain steps on the corpus"
train base "$base_steps" --after corpus -- --data.train "[$(quoted "$folder/corpus")]" --run.seed 1

stage "Reference: $reference_steps plain steps on curated text, from the base model"
train reference "$reference_steps" --after curated --after base -- \
    --data.train "[$(quoted "$curated_corpus")]" --run.seed 2 --checkpoint.initialize_from "$folder/base"

stage "Score: the reference's loss of every token of the corpus"
once scores --makes scores --after corpus --after reference -- bash launch/local.sh "$processes" score \
    --checkpoint "$folder/reference" --corpus "$folder/corpus" --output "$folder/scores" --micro-batch-size 32

arm() { # name, overrides: same base, data, order and steps for every arm
    local name=$1; shift
    train "$name" "$arm_steps" --after corpus --after base --after scores -- --data.train "[$(quoted "$folder/corpus")]" --run.seed 3 --run.name "$name" \
        --checkpoint.initialize_from "$folder/base" --selection.reference.scores "[$(quoted "$folder/scores")]" "$@"
}
stage "Arm 1 of 3: plain CLM, $arm_steps steps"
arm plain --selection.scorer none
stage "Arm 2 of 3: SLM, the 60 % of tokens with the highest excess loss"
arm slm --selection.scorer excess_loss --selection.keep_fraction 0.6
stage "Arm 3 of 3: a random 60 %"
arm random --selection.scorer random --selection.keep_fraction 0.6

stage "Export the SLM model to Hugging Face, and compare logits"
once export --makes huggingface --after slm --after tokenizer -- \
    python -m megatron_slm.export_hf --checkpoint "$folder/slm" --output "$folder/huggingface"
python -m megatron_slm.check_export --checkpoint "$folder/slm" --export "$folder/huggingface" --corpus "$held_out_corpus"

stage "Report"
python -m megatron_slm.report --runs "$folder/plain" "$folder/slm" "$folder/random" --output "$folder/report.html"

cat <<END

Finished in $((SECONDS - started)) seconds. Everything is in $folder:
  report.html                     loss of the three arms, what was selected, a page of text with the selected tokens marked
  plain/ slm/ random/             run folders: metrics.jsonl, config.yaml, checkpoints/, wandb/ (wandb sync $folder/slm/wandb/offline-run-*)
  scores/                         the reference's loss of every token of the corpus
  huggingface/                    the SLM model for transformers: AutoModelForCausalLM.from_pretrained("$folder/huggingface")
  corpus.bin corpus.idx           the indexed binary; tokenizer.model its vocabulary
END
