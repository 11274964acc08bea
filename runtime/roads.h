// How bytes get from one rank's device to another's, pair by pair: straight, where both devices are
// in a group that their backend makes (struct backend: groups; NCCL between CUDA devices), or
// through the host and MPI (runtime/exchange.h), which always works. The group is all ranks whose
// backend has one; there is none where fewer than two do, and `struct roads *` is then NULL, of
// which every function here knows that no road is straight.
//
// Straight transfers run on streams of their own, a lane each: rows of experts, sums of gradients.
// A lane starts after what the device's stream holds when a step of transfers is begun, and that
// stream goes on beside it until roads_join().
#ifndef DITMOE_ROADS_H
#define DITMOE_ROADS_H

#include "devices/device.h"
#include "runtime/exchange.h"

struct roads;

enum road_choice {
    ROADS_AUTO,     // straight where possible
    ROADS_HOST,     // never straight
    ROADS_STRAIGHT, // every pair, or fail with why not
    ROADS_PEER,     // none of these: all pairs by peer windows (runtime/peers.h)
};

enum road_lane { LANE_ROWS, LANE_SUMS, LANES };

// A collective call. `stream` is the one that the device computes on.
int roads_open(struct exchange *x, struct device *dev, struct stream *stream,
               enum road_choice choice, struct roads **out);
void roads_close(struct roads *r);

bool roads_straight(const struct roads *r, int rank); // from this rank to `rank`
bool roads_all(const struct roads *r);                // is every rank in the group?
int roads_members(const struct roads *r);             // 0 of NULL

// Transfers between begin and end are one step: what one rank sends, the other receives in it, in
// the same order pair by pair. The memory belongs to the lane until roads_join(). Not with NULL.
int roads_begin(struct roads *r, enum road_lane lane);
int roads_send(struct roads *r, enum road_lane lane, const struct mem *src, size_t offset,
               size_t bytes, int rank);
int roads_receive(struct roads *r, enum road_lane lane, struct mem *dst, size_t offset,
                  size_t bytes, int rank);
// [count] f32 in place over all members of the group; the same bits on each.
int roads_sum(struct roads *r, enum road_lane lane, struct mem *at, size_t offset, size_t count);
int roads_end(struct roads *r, enum road_lane lane);

// The device's stream goes on after what the lane holds. Does not wait here.
int roads_join(struct roads *r, enum road_lane lane);

// Seconds that the device's stream has stood still in roads_join() of a lane since the last call,
// as far as the device has come; waits for it. Of NULL: 0.
int roads_waited(struct roads *r, enum road_lane lane, double *seconds);

#endif
