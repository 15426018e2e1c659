# Stages of a long script that are run once: finished ones are kept while what they were made from is unchanged.
# Sourced, with `folder` set to where the stages write.
# shellcheck shell=bash

# once NAME [--after STAGE]... [--reads FILE]... [--makes PATTERN]... -- COMMAND...
#
# Runs COMMAND unless stage NAME finished before with the same command, the same contents of the FILEs and the same
# STAGEs before it. What an earlier call made from something else, in full or in part, is moved to FOLDER/earlier_N and
# made again; so is what no stage is known to have made. PATTERNs name what the stage writes, below FOLDER.
# FOLDER/.stage_NAME says what the stage was made from: "done KEY", or "started KEY" until it has finished.
once() {
    local name=$1 key state='' old_key='' found
    local after=() reads=() makes=()
    shift
    while [ "$1" != -- ]; do
        case $1 in
            --after) after+=("$2") ;;
            --reads) reads+=("$2") ;;
            --makes) makes+=("$2") ;;
        esac
        shift 2
    done
    shift
    key=$(stage_key "$@") || return
    [ ! -e "$folder/.stage_$name" ] || read -r state old_key <"$folder/.stage_$name"
    found=$(stage_outputs)
    if [ "$state $old_key" = "done $key" ] && { [ -n "$found" ] || [ ${#makes[@]} -eq 0 ]; }; then
        echo "done before: $name"
        return
    fi
    if [ -n "$found" ] && [ "$old_key" != "$key" ]; then
        stage_move_aside
    fi
    stage_mark started
    stage_run "$@" || return
    stage_mark "done"
}

# The fingerprint of what the stage is made from. Paths in the command are left out: contents count, and the folder may move.
stage_key() {
    local word file
    {
        for word in "$name" "$@"; do
            word=${word//"$folder"/FOLDER}
            for file in "${reads[@]}"; do word=${word//"$file"/FILE}; done
            printf '%s\0' "$word"
        done
        for word in "${after[@]}"; do
            cat "$folder/.stage_$word" || return
        done
        for word in "${reads[@]}"; do
            sha256sum <"$word" || return
        done
    } | sha256sum | cut -d ' ' -f 1
}

stage_outputs() {
    local pattern
    for pattern in "${makes[@]}"; do
        compgen -G "$(printf '%q' "$folder")/$pattern" || true
    done
}

stage_move_aside() {
    local number=1 path
    if [ -z "${earlier:-}" ]; then
        while [ -e "$folder/earlier_$number" ]; do number=$((number + 1)); done
        earlier=$folder/earlier_$number
        mkdir "$earlier"
    fi
    if [ -n "$state" ]; then
        echo "$name: its inputs or options have changed, so it is made again; what was made before is in $earlier"
    else
        echo "$name: nothing says what it was made from, so it is made again; what was there is in $earlier"
    fi
    while read -r path; do mv "$path" "$earlier/"; done <<<"$found"
    [ -z "$state" ] || mv "$folder/.stage_$name" "$earlier/"
}

stage_mark() {
    echo "$1 $key" >"$folder/.stage_$name.tmp"
    mv "$folder/.stage_$name.tmp" "$folder/.stage_$name"
}

# A session of its own: the terminal's signals reach this script alone, which passes on a request to stop.
stage_run() {
    setsid "$@" &
    stage_child=$!
    slm_wait "$stage_child"
    stage_child=
    [ "$SLM_EXIT_CODE" -eq 0 ] || echo "$name ended with exit code $SLM_EXIT_CODE; the same command continues from here" >&2
    return "$SLM_EXIT_CODE"
}

stage_stop() {
    SLM_INTERRUPTED=yes
    [ -n "${stage_child:-}" ] || exit 85
    kill -TERM "$stage_child" 2>/dev/null || true
}
