#!/usr/bin/env bash
# The whole of Selective Language Modeling on this machine, from raw text to a report, with real megatron-core processes:
#
#   bash launch/quickstart.sh                 7 to 12 minutes on 2 CPU cores, after the downloads
#   bash launch/quickstart.sh --quick         the same in 2 to 3 minutes, on less text (too short to compare the arms)
#   bash launch/quickstart.sh --corpus my.jsonl --curated good.jsonl      your own text, one {"text": ...} per line
#
# --folder DIR          where everything goes (default runs/quickstart, runs/quickstart_quick with --quick)
# --text-bytes BYTES    how much of the standard library is read, spread over all of it by hash (default 5500000; 0 = all,
#                       which takes longer: the reference scores every token)
#
# Text -> tokenizer -> indexed binary -> base model -> reference -> scores -> three arms (plain, SLM 0.6, random 0.6) that continue
# from the same base, over the same data in the same order -> Hugging Face export -> report. Run it again after an interruption:
# finished stages are kept, training resumes from its last checkpoint.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
quick=no corpus='' curated='' folder='' text_bytes=''
while [ $# -gt 0 ]; do
    case $1 in
        --quick) quick=yes ;;
        --corpus | --curated | --folder | --text-bytes)
            [ $# -ge 2 ] || { echo "quickstart: $1 needs a value" >&2; exit 2; }
            name=${1#--}; declare "${name//-/_}=$2"; shift ;;
        -h | --help) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) echo "quickstart: unknown option $1; try --help" >&2; exit 2 ;;
    esac
    shift
done
[ -z "$corpus$curated" ] || { [ -n "$corpus" ] && [ -n "$curated" ]; } || { echo "quickstart: --corpus and --curated go together" >&2; exit 2; }
[ -n "$folder" ] || { folder=runs/quickstart; [ "$quick" = no ] || folder=runs/quickstart_quick; }
source launch/venv.sh

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

stage() { printf '\n\033[1m[%3ds] %s\033[0m\n' "$((SECONDS - started))" "$1"; }
once() { # name, command: run it unless it finished in an earlier call
    local name=$1; shift
    if [ -e "$folder/.done_$name" ]; then echo "done before: $name"; return; fi
    "$@"
    touch "$folder/.done_$name"
}
train() { # run folder, steps, more overrides
    local run=$1 steps=$2; shift 2
    once "train_$run" bash launch/local.sh "$processes" train --config launch/recipes/quickstart.yaml \
        --run.folder "$folder/$run" --schedule.train_steps "$steps" --monitoring.validation_interval_steps "$validate" --monitoring.validation_batches "$validation_batches" \
        --data.tokenizer "$folder/tokenizer.model" --data.validation "[{name: target, corpus: $folder/held_out}]" "$@"
}

stage "Text"
if [ -z "$corpus" ]; then
    once text python launch/stdlib_corpus.py --output-folder "$folder/text" --max-bytes "$text_bytes"
    corpus=$folder/text/corpus.jsonl curated=$folder/text/curated.jsonl held_out=$folder/text/held_out.jsonl
fi

stage "Tokenizer: SentencePiece, $vocabulary pieces"
once tokenizer python -m tokenizer.train --input "$corpus" --output-prefix "$folder/tokenizer" --vocab-size "$vocabulary" --sample-bytes 8000000

stage "Preprocess: text to indexed binary"
preprocess() { python -m data_tools.preprocess --input "$1" --tokenizer "$folder/tokenizer.model" --output-prefix "$folder/$2" --workers 2; }
once corpus preprocess "$corpus" corpus
if [ -n "${held_out:-}" ]; then
    once curated preprocess "$curated" curated
    once held_out preprocess "$held_out" held_out
else
    once all_curated preprocess "$curated" all_curated
    hold_out() { # every sixth curated document is the target domain
        python -m data_tools.split "$folder/all_curated" --held-out-fraction 0.16 --output-prefix "$folder/all_curated_split" --overwrite
        for suffix in bin idx manifest.json; do
            ln -f "$folder/all_curated_split_train.$suffix" "$folder/curated.$suffix"
            ln -f "$folder/all_curated_split_held_out.$suffix" "$folder/held_out.$suffix"
        done
    }
    once split hold_out
fi
once verify python -m data_tools.verify "$folder/corpus"

stage "Base model: $base_steps plain steps on the corpus"
train base "$base_steps" --data.train "[$folder/corpus]" --run.seed 1

stage "Reference: $reference_steps plain steps on curated text, from the base model"
train reference "$reference_steps" --data.train "[$folder/curated]" --run.seed 2 --checkpoint.initialize_from "$folder/base"

stage "Score: the reference's loss of every token of the corpus"
once score bash launch/local.sh "$processes" score --checkpoint "$folder/reference" --corpus "$folder/corpus" --output "$folder/scores" --micro-batch-size 32

arm() { # name, overrides: same base, data, order and steps for every arm
    local name=$1; shift
    train "$name" "$arm_steps" --data.train "[$folder/corpus]" --run.seed 3 --run.name "$name" --checkpoint.initialize_from "$folder/base" \
        --selection.reference.scores "[$folder/scores]" "$@"
}
stage "Arm 1 of 3: plain CLM, $arm_steps steps"
arm plain --selection.scorer none
stage "Arm 2 of 3: SLM, the 60 % of tokens with the highest excess loss"
arm slm --selection.scorer excess_loss --selection.keep_fraction 0.6
stage "Arm 3 of 3: a random 60 %"
arm random --selection.scorer random --selection.keep_fraction 0.6

stage "Export the SLM model to Hugging Face, and compare logits"
once export python -m megatron_slm.export_hf --checkpoint "$folder/slm" --output "$folder/huggingface" --overwrite
python -m megatron_slm.check_export --checkpoint "$folder/slm" --export "$folder/huggingface" --corpus "$folder/held_out"

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
