#include "runtime/json_file.h"

#include "devices/error.h"

int json_read(const char *path, json_t **out)
{
    json_error_t wrong;
    *out = json_load_file(path, JSON_REJECT_DUPLICATES, &wrong);
    if (*out)
        return 0;
    if (json_error_code(&wrong) == json_error_cannot_open_file)
        return fail(ERR_IO, "%s: cannot be read", path);
    return fail(ERR_INPUT, "%s: not JSON: line %d: %s", path, wrong.line, wrong.text);
}
