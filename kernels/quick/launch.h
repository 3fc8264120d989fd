// What the launch of a quick kernel needs, read out of its PTX by
// dbsam_deploy/kernels/quick_sources.py.
#pragma once

namespace dbsam::quick {

struct Launch {
  int x, y;  // blocks along x and y for one image or window
  int threads;
  int shared_bytes;
  int resident;  // blocks that are to fit a multiprocessor's registers
};

}  // namespace dbsam::quick
