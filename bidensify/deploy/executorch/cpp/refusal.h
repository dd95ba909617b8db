// Why something was refused: in ExecuTorch's log, and kept for whoever asks.
#ifndef BIDENSIFY_REFUSAL_H
#define BIDENSIFY_REFUSAL_H

namespace bidensify {

// Of this thread: logs, and keeps.
void refuse(const char* what);
const char* last_refusal();
void forget_refusal();

}  // namespace bidensify
#endif
