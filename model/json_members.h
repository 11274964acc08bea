// The members of a JSON object, one at a time and in no memory of its own: for headers of files
// that may be hostile, of which a tree of the whole can take forty times the text. What a member is
// made of is not looked at beyond its ends: jansson reads it, member by member.
#ifndef DITMOE_JSON_MEMBERS_H
#define DITMOE_JSON_MEMBERS_H

#include <stdbool.h>
#include <stddef.h>

struct json_span {
    const char *text;
    size_t length;
};

struct json_members {
    const char *begin, *at, *end;
    const char *wrong; // what ended the walk too early; NULL: nothing did
    bool started;
};

// Of `object`, which may have white space around it.
struct json_members json_members(struct json_span object);
// The next member: its key with the quotes, and its value. False at the end, or with m->wrong,
// which is then at byte m->at - m->begin.
bool json_members_next(struct json_members *m, struct json_span *key, struct json_span *value);

#endif
