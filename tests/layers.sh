#!/usr/bin/env bash
# The rules that keep the tree a tree: includes point down only (tools -> model -> runtime -> devices),
# and files above devices/ name no backend. Prints a line a rule, then 'N passed, N failed'.
cd "$(dirname "$0")/.." || exit 1
passed=0 failed=0
rule() { # rule TEXT COMMAND...: the command must print nothing
    local text=$1 found
    shift
    found=$("$@")
    if [ -z "$found" ]; then
        echo "ok      $text"; passed=$((passed + 1))
    else
        echo "FAILED  $text"; printf '%s\n' "$found" | sed 's/^/    /'; failed=$((failed + 1))
    fi
}
includes() { grep -nE "#include \"($2)/" "$1"/*.[ch] "$1"/*.def 2>/dev/null; }
rule "devices/ includes nothing above it" includes devices 'runtime|model|tools'
rule "runtime/ includes nothing above it" includes runtime 'model|tools'
rule "model/ includes nothing above it" includes model 'tools'
rule "model/ names no CUDA or OpenCL" grep -niE 'cuda|opencl|cl_mem|clEnqueue|cublas' model/*.c model/*.h
rule "runtime/ calls no CUDA or OpenCL" grep -nE 'cl_mem|clEnqueue|cuLaunch|#include <CL' runtime/*.c runtime/*.h
rule "no exit() or printing to stderr below tools/" grep -nE '\b(exit|perror) *\(|fprintf\(stderr' model/*.c runtime/*.c
rule "mad() is nowhere in the kernels (it is not fused on every device)" \
    sh -c "sed 's,//.*,,' kernels.cl | grep -nE '\\bmad *\\('"
# a kernel that forgets one would read from where the allocation begins
views() {
    awk '/^KERNEL/ { kernel = 1; wanted = ""; next }
        kernel { line = $0; while (match(line, /VIEW\([a-z0-9_]+\)/)) {
                     wanted = wanted ", " substr(line, RSTART + 5, RLENGTH - 6)
                     line = substr(line, RSTART + RLENGTH) } }
        kernel && /_ARGUMENTS\(VIEW\)/ { wanted = "" ; kernel = 0 }
        kernel && /OFFSETS[1-9]\(/ { match($0, /\(.*\)/); is = ", " substr($0, RSTART + 1, RLENGTH - 2)
                     if (is != wanted) print FILENAME ":" FNR ": OFFSETS of" substr(is, 2) ", VIEWs" substr(wanted, 2)
                     kernel = 0 }
        kernel && /^}/ { print FILENAME ":" FNR ": a kernel without OFFSETS"; kernel = 0 }' kernels.cl
}
rule "every kernel moves all of its VIEWs" views
rule "no source file over 800 lines (kernels.cl excepted)" \
    sh -c 'wc -l devices/*.[ch] runtime/*.[ch] model/*.[ch] tools/*.[ch] tests/*.[ch] | awk "\$1 > 800 && \$2 != \"total\""'
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
