#include "cache/radix_tree.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/check.h"
#include "cache/page_hash.h"

namespace sapwood {
namespace {

constexpr size_t kFirstBuckets = 64;
constexpr size_t kKeptCapacity = 4096;  // entries of a deleted node's vectors kept for its successor

// Length of the common prefix of a[0, n) and b[0, n). 16 keys (a cache line) at a time: memcmp is vectorised.
size_t CommonPrefix(const int32_t* a, const int32_t* b, size_t n) {
  size_t i = 0;
  while (i + 16 <= n && std::memcmp(a + i, b + i, 16 * sizeof(int32_t)) == 0) i += 16;
  while (i < n && a[i] == b[i]) ++i;
  return i;
}

template <typename T>
void Reset(std::vector<T>* v) {
  if (v->capacity() > kKeptCapacity) {
    std::vector<T>().swap(*v);
  } else {
    v->clear();
  }
}

}  // namespace

RadixTree::RadixTree(const CacheConfig& config, std::vector<PagePool>* pools, std::vector<CacheEvent>* events)
    : page_size_(config.groups[0].page_size),
      num_groups_(static_cast<int>(config.groups.size())),
      flat_(config.kind == CacheKind::kFlat),
      record_events_(config.record_events),
      max_node_pages_(flat_ ? 1 : kPathEnd),
      pools_(pools),
      events_(events),
      buckets_(kFirstBuckets, nullptr),
      lru_(config.groups.size()),
      evictable_(config.groups.size(), 0) {
  for (const KvGroup& group : config.groups) {
    windows_.push_back(group.kind == KvKind::kWindow ? group.window : 0);
    // A lease's window lock covers whole nodes, so a node of a quarter window bounds what is locked in vain.
    if (group.kind == KvKind::kWindow) {
      max_node_pages_ = std::min(max_node_pages_, std::max(1, group.window / page_size_ / 4));
    }
  }
}

// ---- Nodes ----

TreeNode* RadixTree::NewNode(uint64_t ns, TreeNode* parent, int32_t begin) {
  if (spare_.empty()) spare_.push_back(&nodes_.emplace_back());
  TreeNode* node = spare_.back();
  spare_.pop_back();
  node->id = ++last_node_id_;
  node->ns = ns;
  node->parent = parent;
  node->begin = begin;
  node->live = true;
  node->groups.resize(static_cast<size_t>(num_groups_));
  return node;
}

void RadixTree::FreeNode(TreeNode* node) {
  Reset(&node->keys);
  Reset(&node->hashes);
  for (TreeNode::Group& group : node->groups) {
    Reset(&group.pages);
    group.first_valid = group.locks = 0;
    group.older = group.newer = nullptr;
  }
  node->parent = node->first_child = node->prev_sibling = node->next_sibling = node->next_in_bucket = nullptr;
  node->num_pages = node->pins = 0;
  node->live = node->attached = false;
  node->owner = 0;
  node->ready_step = kNoStep;
  spare_.push_back(node);
}

TreeNode* RadixTree::Root(uint64_t ns) {
  TreeNode*& root = roots_[ns];
  if (root == nullptr) {
    root = NewNode(ns, nullptr, 0);
    root->attached = true;
  }
  return root;
}

void RadixTree::LinkChild(TreeNode* node) {
  TreeNode* parent = node->parent;
  node->prev_sibling = nullptr;
  node->next_sibling = parent->first_child;
  if (node->next_sibling != nullptr) node->next_sibling->prev_sibling = node;
  parent->first_child = node;
  InsertBucket(node);
  node->attached = true;
  ++num_nodes_;
}

void RadixTree::UnlinkChild(TreeNode* node) {
  EraseBucket(node);
  if (node->prev_sibling != nullptr) {
    node->prev_sibling->next_sibling = node->next_sibling;
  } else {
    node->parent->first_child = node->next_sibling;
  }
  if (node->next_sibling != nullptr) node->next_sibling->prev_sibling = node->prev_sibling;
  node->prev_sibling = node->next_sibling = nullptr;
  node->attached = false;
  --num_nodes_;
}

// The first num_upper pages of node become a new node above it; the existing object stays the lower half.
TreeNode* RadixTree::Split(TreeNode* node, int32_t num_upper) {
  SAPWOOD_CHECK(num_upper > 0 && num_upper < node->num_pages, "split at ", num_upper, " of ", node->num_pages);
  const bool attached = node->attached;
  TreeNode* upper = NewNode(node->ns, node->parent, node->begin);
  if (attached) UnlinkChild(node);

  const auto num_keys = static_cast<ptrdiff_t>(num_upper) * page_size_;
  upper->keys.assign(node->keys.begin(), node->keys.begin() + num_keys);
  node->keys.erase(node->keys.begin(), node->keys.begin() + num_keys);
  if (!node->hashes.empty()) {
    upper->hashes.assign(node->hashes.begin(), node->hashes.begin() + num_upper);
    node->hashes.erase(node->hashes.begin(), node->hashes.begin() + num_upper);
  }
  upper->num_pages = num_upper;
  upper->pins = node->pins;
  upper->owner = node->owner;
  upper->ready_step = node->ready_step;
  node->num_pages -= num_upper;
  node->begin += num_upper;
  node->parent = upper;

  for (int g = 0; g < num_groups_; ++g) {
    TreeNode::Group& above = upper->groups[static_cast<size_t>(g)];
    TreeNode::Group& below = node->groups[static_cast<size_t>(g)];
    above.pages.assign(below.pages.begin(), below.pages.begin() + num_upper);
    below.pages.erase(below.pages.begin(), below.pages.begin() + num_upper);
    above.first_valid = std::min(below.first_valid, num_upper);
    below.first_valid -= above.first_valid;
    above.locks = below.locks;
    if (attached && above.locks == 0 && upper->num_valid(g) > 0) InsertUpper(node, upper, g);
  }
  if (attached) {
    LinkChild(upper);
    LinkChild(node);
  }
  return upper;
}

TreeNode* RadixTree::CutAt(TreeNode* node, int32_t end) {
  while (node->parent != nullptr && node->begin >= end) node = node->parent;
  return node->end() > end ? Split(node, end - node->begin) : node;
}

int32_t RadixTree::FirstOverlap(const TreeNode* node, int32_t first) const {
  if (node->end() <= first) return node->end();
  while (node->parent != nullptr && node->parent->end() > first) node = node->parent;
  return node->begin;
}

void RadixTree::FillTables(const TreeNode* node, PageTables* tables) const {
  const int32_t end = node->end();
  for (std::vector<PageId>& pages : tables->pages) pages.assign(static_cast<size_t>(end), kNoPage);
  for (; node->parent != nullptr; node = node->parent) {
    for (size_t g = 0; g < tables->pages.size(); ++g) {
      const std::vector<PageId>& pages = node->groups[g].pages;
      const int32_t skipped = std::clamp(tables->first[g] - node->begin, 0, node->num_pages);
      std::copy(pages.begin() + skipped, pages.end(), tables->pages[g].begin() + node->begin + skipped);
    }
  }
}

// ---- The hash table of children: intrusive chains, as in LevelDB's HandleTable ----

PageHash RadixTree::ChainHash(const TreeNode* node) const {
  return node->parent == nullptr ? SeedHash(node->ns) : node->hashes.back();
}

uint64_t RadixTree::BucketHash(const TreeNode* parent, const int32_t* keys, PageHash* chained) const {
  if (flat_) {
    *chained = NextHash(ChainHash(parent), keys, page_size_);
    return chained->lo;
  }
  uint64_t hash = MixBits(parent->id);
  for (int32_t i = 0; i < page_size_; ++i) {
    hash = (hash ^ static_cast<uint32_t>(keys[i])) * 0x9e3779b97f4a7c15ULL;
    hash ^= hash >> 29;
  }
  return MixBits(hash);
}

TreeNode* RadixTree::FindChild(const TreeNode* parent, const int32_t* keys) const {
  if (parent->first_child == nullptr) return nullptr;
  PageHash chained;
  const uint64_t hash = BucketHash(parent, keys, &chained);
  for (TreeNode* node = buckets_[hash & (buckets_.size() - 1)]; node != nullptr; node = node->next_in_bucket) {
    if (node->bucket_hash != hash) continue;
    if (flat_) {
      if (node->hashes.back() == chained) return node;
    } else if (node->parent == parent &&
               std::memcmp(node->keys.data(), keys, static_cast<size_t>(page_size_) * sizeof(int32_t)) == 0) {
      return node;
    }
  }
  return nullptr;
}

void RadixTree::InsertBucket(TreeNode* node) {
  if (static_cast<size_t>(num_nodes_) >= buckets_.size()) GrowBuckets();
  PageHash chained;
  node->bucket_hash = BucketHash(node->parent, node->keys.data(), &chained);
  TreeNode*& bucket = buckets_[node->bucket_hash & (buckets_.size() - 1)];
  node->next_in_bucket = bucket;
  bucket = node;
}

void RadixTree::EraseBucket(TreeNode* node) {
  TreeNode** link = &buckets_[node->bucket_hash & (buckets_.size() - 1)];
  while (*link != node) link = &(*link)->next_in_bucket;
  *link = node->next_in_bucket;
  node->next_in_bucket = nullptr;
}

void RadixTree::GrowBuckets() {
  std::vector<TreeNode*> old(buckets_.size() * 2, nullptr);
  old.swap(buckets_);
  for (TreeNode* node : old) {
    while (node != nullptr) {
      TreeNode* next = node->next_in_bucket;
      TreeNode*& bucket = buckets_[node->bucket_hash & (buckets_.size() - 1)];
      node->next_in_bucket = bucket;
      bucket = node;
      node = next;
    }
  }
}

// ---- Match ----

int32_t RadixTree::FirstNeeded(int g, int64_t len) const {
  // The query at position len sees [len + 1 - window, len].
  const int32_t window = windows_[static_cast<size_t>(g)];
  return window == 0 ? 0 : static_cast<int32_t>(std::max<int64_t>(0, len + 1 - window) / page_size_);
}

RadixTree::Found RadixTree::Match(uint64_t ns, std::span<const int32_t> keys) const {
  Found best;
  const auto root = roots_.find(ns);
  if (root == roots_.end()) return best;
  best.node = root->second;

  const auto total = static_cast<int32_t>(keys.size() / static_cast<size_t>(page_size_));
  const TreeNode* parent = best.node;
  std::array<int32_t, kMaxGroups> valid_from{};  // per group, every page in [valid_from, position) is there
  for (int32_t position = 0; position < total;) {
    const int32_t* rest = keys.data() + static_cast<ptrdiff_t>(position) * page_size_;
    TreeNode* child = FindChild(parent, rest);
    if (child == nullptr) break;
    const size_t limit = std::min(child->keys.size(), keys.size() - static_cast<size_t>(position) * page_size_);
    const size_t common = flat_ ? limit : CommonPrefix(child->keys.data(), rest, limit);
    const auto matched = static_cast<int32_t>(common / static_cast<size_t>(page_size_));

    const auto usable = [&](int32_t count) {  // may a prefix end after `count` pages of child?
      for (int g = 0; g < num_groups_; ++g) {
        if (!is_window(g)) continue;
        const int32_t lost = child->groups[static_cast<size_t>(g)].first_valid;
        const int32_t from = lost == 0 ? valid_from[static_cast<size_t>(g)] : position + std::min(lost, count);
        if (FirstNeeded(g, static_cast<int64_t>(position + count) * page_size_) < from) return false;
      }
      return true;
    };
    for (int32_t count = matched; count > 0; --count) {
      if (!usable(count)) continue;
      best = {child, count, position + count};
      break;
    }
    for (int g = 0; g < num_groups_; ++g) {
      const int32_t lost = child->groups[static_cast<size_t>(g)].first_valid;
      if (lost > 0) valid_from[static_cast<size_t>(g)] = position + lost;
    }
    position += matched;
    if (matched < child->num_pages) break;
    parent = child;
  }
  return best;
}

// ---- Locks and LRU lists ----

void RadixTree::Append(TreeNode* node, int g) {
  LruList& list = lru_[static_cast<size_t>(g)];
  TreeNode::Group& links = node->groups[static_cast<size_t>(g)];
  links.older = list.newest;
  links.newer = nullptr;
  (list.newest == nullptr ? list.oldest : list.newest->groups[static_cast<size_t>(g)].newer) = node;
  list.newest = node;
}

// Beside the lower half, where the eviction order of the pages stays what it was: see the header.
void RadixTree::InsertUpper(TreeNode* lower, TreeNode* upper, int g) {
  const auto i = static_cast<size_t>(g);
  TreeNode::Group& links = upper->groups[i];
  links.older = is_window(g) ? lower->groups[i].older : lower;
  links.newer = is_window(g) ? lower : lower->groups[i].newer;
  (links.older == nullptr ? lru_[i].oldest : links.older->groups[i].newer) = upper;
  (links.newer == nullptr ? lru_[i].newest : links.newer->groups[i].older) = upper;
}

void RadixTree::Remove(TreeNode* node, int g) {
  LruList& list = lru_[static_cast<size_t>(g)];
  TreeNode::Group& links = node->groups[static_cast<size_t>(g)];
  (links.older == nullptr ? list.oldest : links.older->groups[static_cast<size_t>(g)].newer) = links.newer;
  (links.newer == nullptr ? list.newest : links.newer->groups[static_cast<size_t>(g)].older) = links.older;
  links.older = links.newer = nullptr;
}

void RadixTree::LockGroup(TreeNode* node, int g) {
  if (node->groups[static_cast<size_t>(g)].locks++ > 0) return;
  if (!node->attached || node->num_valid(g) == 0) return;
  Remove(node, g);
  evictable_[static_cast<size_t>(g)] -= node->num_valid(g);
}

void RadixTree::UnlockGroup(TreeNode* node, int g) {
  TreeNode::Group& group = node->groups[static_cast<size_t>(g)];
  SAPWOOD_CHECK(group.locks > 0, "unlock of an unlocked node");
  if (--group.locks > 0 || node->num_valid(g) == 0) return;
  if (node->attached) {
    Append(node, g);
    evictable_[static_cast<size_t>(g)] += node->num_valid(g);
  } else {
    while (group.first_valid < node->num_pages) FreePage(node, g, group.first_valid++, PageState::kLimbo);
  }
}

void RadixTree::Lock(const PathLock& lock) {
  for (TreeNode* node = lock.node; node != nullptr; node = node->parent) {
    ++node->pins;
    if (node->parent == nullptr) break;
    for (int g = 0; g < num_groups_; ++g) {
      const auto i = static_cast<size_t>(g);
      if (node->begin >= lock.from[i] && node->begin < lock.to[i]) LockGroup(node, g);
    }
  }
}

void RadixTree::Unlock(const PathLock& lock) {
  for (int g = 0; g < num_groups_; ++g) {
    const auto i = static_cast<size_t>(g);
    if (is_window(g)) UnlockRange(lock.node, g, lock.from[i], lock.to[i]);
  }
  for (TreeNode* node = lock.node; node != nullptr;) {
    TreeNode* parent = node->parent;  // read first: Unpin may delete the node
    for (int g = 0; g < num_groups_ && parent != nullptr; ++g) {
      const auto i = static_cast<size_t>(g);
      if (!is_window(g) && node->begin >= lock.from[i] && node->begin < lock.to[i]) UnlockGroup(node, g);
    }
    Unpin(node);
    node = parent;
  }
}

void RadixTree::Pin(TreeNode* node) {
  for (; node != nullptr; node = node->parent) ++node->pins;
}

void RadixTree::Unpin(TreeNode* node) {
  SAPWOOD_CHECK(node->pins > 0, "unpin of an unpinned node");
  if (--node->pins > 0) return;
  if (node->attached) {
    DeleteIfUseless(node);
  } else {
    FreeNode(node);  // invalidated; its last lock has just freed its pages
  }
}

void RadixTree::UnlockRange(TreeNode* node, int g, int32_t from, int32_t to) {
  scratch_.clear();  // as many nodes as a window overlaps
  for (; node->parent != nullptr && node->begin >= from; node = node->parent) {
    if (node->begin < to) scratch_.push_back(node);
  }
  for (size_t i = scratch_.size(); i-- > 0;) UnlockGroup(scratch_[i], g);
}

// ---- Insert ----

bool RadixTree::CanGrow(const PathLock& lock, uint64_t owner) const {
  const TreeNode* node = lock.node;
  // pins == 1: only this lease is here, so nobody remembers the node's end; owner: one lease invalidates it or none.
  if (node->parent == nullptr || node->first_child != nullptr || node->pins != 1 || node->owner != owner) return false;
  if (node->num_pages >= max_node_pages_) return false;
  for (int g = 0; g < num_groups_; ++g) {
    if (node->begin < lock.from[static_cast<size_t>(g)]) return false;
  }
  return true;
}

void RadixTree::Descend(PathLock* lock, TreeNode* child, const PageTables& tables) {
  lock->node = child;
  ++child->pins;
  for (int g = 0; g < num_groups_; ++g) {
    const auto i = static_cast<size_t>(g);
    if (child->end() <= tables.first[i]) {
      lock->from[i] = child->end();  // the window has already moved past it
    } else {
      LockGroup(child, g);
    }
  }
}

void RadixTree::AppendPages(TreeNode* node, const int32_t* keys, int32_t count, const PageTables& tables) {
  const bool hashing = flat_ || record_events_;
  node->keys.insert(node->keys.end(), keys, keys + static_cast<ptrdiff_t>(count) * page_size_);
  for (int32_t i = 0; i < count; ++i) {
    if (hashing) {
      const PageHash previous = node->hashes.empty() ? ChainHash(node->parent) : node->hashes.back();
      node->hashes.push_back(NextHash(previous, keys + static_cast<ptrdiff_t>(i) * page_size_, page_size_));
    }
    const int32_t index = node->num_pages++;
    for (int g = 0; g < num_groups_; ++g) {
      TreeNode::Group& group = node->groups[static_cast<size_t>(g)];
      const PageId page = tables.pages[static_cast<size_t>(g)][static_cast<size_t>(node->begin + index)];
      group.pages.push_back(page);
      if (page == kNoPage) {
        SAPWOOD_CHECK(is_window(g) && group.first_valid == index, "a hole in group ", g);
        ++group.first_valid;
        continue;
      }
      pool(g).Move(page, PageState::kLeased, PageState::kCached);
      Emit(CacheEvent::Kind::kStored, node, g, index);
    }
  }
}

// Gives a window group's lost pages back from the row's own copies. Not where another live lease owns the node:
// if either failed, the other's pages would have to leave the tree with it.
void RadixTree::Refill(TreeNode* node, const PageTables& tables, uint64_t owner, int64_t ready_step) {
  if (node->owner != 0 && node->owner != owner) return;
  for (int g = 0; g < num_groups_; ++g) {
    TreeNode::Group& group = node->groups[static_cast<size_t>(g)];
    while (group.first_valid > 0) {
      const int32_t index = group.first_valid - 1;
      const PageId page = tables.pages[static_cast<size_t>(g)][static_cast<size_t>(node->begin + index)];
      if (page == kNoPage || pool(g).state(page) != PageState::kLeased) break;
      pool(g).Move(page, PageState::kLeased, PageState::kCached);
      group.pages[static_cast<size_t>(index)] = page;
      group.first_valid = index;
      node->owner = owner;
      node->ready_step = std::max(node->ready_step, ready_step);
      Emit(CacheEvent::Kind::kStored, node, g, index);
    }
  }
}

void RadixTree::Insert(PathLock* lock, std::span<const int32_t> keys, const PageTables& tables, uint64_t owner,
                       int64_t ready_step) {
  SAPWOOD_CHECK(lock->node->attached, "insert below an invalidated node");
  const auto total = static_cast<int32_t>(keys.size() / static_cast<size_t>(page_size_));
  while (lock->node->end() < total) {
    const int32_t position = lock->node->end();
    const int32_t* rest = keys.data() + static_cast<ptrdiff_t>(position) * page_size_;
    if (TreeNode* child = FindChild(lock->node, rest)) {
      const size_t limit =
          std::min(child->keys.size(), static_cast<size_t>(total - position) * static_cast<size_t>(page_size_));
      const auto matched = static_cast<int32_t>(CommonPrefix(child->keys.data(), rest, limit) /
                                                static_cast<size_t>(page_size_));
      SAPWOOD_CHECK(matched > 0, "two prefixes share a 128-bit hash");
      if (matched < child->num_pages) child = Split(child, matched);
      Descend(lock, child, tables);
      Refill(child, tables, owner, ready_step);
      continue;
    }
    if (CanGrow(*lock, owner)) {
      TreeNode* node = lock->node;
      AppendPages(node, rest, std::min(total - position, max_node_pages_ - node->num_pages), tables);
      node->ready_step = std::max(node->ready_step, ready_step);
      continue;
    }
    TreeNode* node = NewNode(lock->node->ns, lock->node, position);
    node->owner = owner;
    node->ready_step = ready_step;
    AppendPages(node, rest, std::min(total - position, max_node_pages_), tables);
    LinkChild(node);
    for (int g = 0; g < num_groups_; ++g) {
      if (node->num_valid(g) == 0) continue;
      Append(node, g);
      evictable_[static_cast<size_t>(g)] += node->num_valid(g);
    }
    Descend(lock, node, tables);
  }
}

// ---- Leaving the tree ----

void RadixTree::Emit(CacheEvent::Kind kind, const TreeNode* node, int g, int32_t index) {
  if (!record_events_) return;
  PageHash parent;
  if (index > 0) {
    parent = node->hashes[static_cast<size_t>(index - 1)];
  } else if (node->parent->parent != nullptr) {
    parent = node->parent->hashes.back();
  }
  events_->push_back({kind, g, node->hashes[static_cast<size_t>(index)], parent,
                      static_cast<int64_t>(node->begin + index) * page_size_});
}

// The caller moves first_valid or num_pages past the page, and the node off its list when it held the last one.
void RadixTree::FreePage(TreeNode* node, int g, int32_t index, PageState from) {
  PageId& page = node->groups[static_cast<size_t>(g)].pages[static_cast<size_t>(index)];
  pool(g).Move(page, from, PageState::kFree);
  page = kNoPage;
  if (from != PageState::kCached) return;  // left the tree when it was invalidated
  --evictable_[static_cast<size_t>(g)];
  Emit(CacheEvent::Kind::kRemoved, node, g, index);
}

bool RadixTree::IsUseless(const TreeNode* node) const {
  if (node->num_pages == 0) return true;
  for (int g = 0; g < num_groups_; ++g) {
    // No prefix that ends in this leaf is valid in that group (but for windows of one token, not worth a case).
    if (node->num_valid(g) == 0) return true;
  }
  return false;
}

void RadixTree::DeleteIfUseless(TreeNode* node) {
  while (node->first_child == nullptr && node->pins == 0) {
    if (node->parent == nullptr) {
      roots_.erase(node->ns);
      FreeNode(node);
      return;
    }
    if (!IsUseless(node)) return;
    for (int g = 0; g < num_groups_; ++g) {
      if (node->num_valid(g) == 0) continue;
      Remove(node, g);
      const int32_t first = node->groups[static_cast<size_t>(g)].first_valid;
      for (int32_t index = node->num_pages - 1; index >= first; --index) FreePage(node, g, index, PageState::kCached);
    }
    TreeNode* parent = node->parent;
    UnlinkChild(node);
    FreeNode(node);
    node = parent;
  }
}

void RadixTree::TrimTail(TreeNode* node) {
  SAPWOOD_CHECK(node->first_child == nullptr && node->pins == 0, "the LRU head is not an unlocked leaf");
  const int32_t index = node->num_pages - 1;
  if (index == 0) {
    // The bucket is found by the first page's keys: unlink before they go.
    for (int g = 0; g < num_groups_; ++g) {
      if (node->num_valid(g) == 0) continue;
      Remove(node, g);
      FreePage(node, g, 0, PageState::kCached);
    }
    TreeNode* parent = node->parent;
    UnlinkChild(node);
    FreeNode(node);
    DeleteIfUseless(parent);
    return;
  }
  for (int g = 0; g < num_groups_; ++g) {
    TreeNode::Group& group = node->groups[static_cast<size_t>(g)];
    if (group.first_valid <= index) {
      if (group.first_valid == index) Remove(node, g);
      FreePage(node, g, index, PageState::kCached);
    }
    group.pages.pop_back();
    group.first_valid = std::min(group.first_valid, index);
  }
  node->keys.resize(static_cast<size_t>(index) * static_cast<size_t>(page_size_));
  if (!node->hashes.empty()) node->hashes.pop_back();
  node->num_pages = index;
  DeleteIfUseless(node);
}

void RadixTree::DropFront(TreeNode* node, int g) {
  TreeNode::Group& group = node->groups[static_cast<size_t>(g)];
  const int32_t index = group.first_valid;
  if (node->num_valid(g) == 1) Remove(node, g);
  FreePage(node, g, index, PageState::kCached);
  group.first_valid = index + 1;
  DeleteIfUseless(node);
}

void RadixTree::Evict(int g, int32_t num_free) {
  while (pool(g).num_free() < num_free) {
    TreeNode* oldest = lru_[static_cast<size_t>(g)].oldest;
    SAPWOOD_CHECK(oldest != nullptr, "group ", g, " has nothing to evict, evictable is ", evictable(g));
    ++num_evict_visits_;
    if (is_window(g)) {
      DropFront(oldest, g);
    } else {
      TrimTail(oldest);
    }
  }
}

void RadixTree::Flush() {
  for (int g = 0; g < num_groups_; ++g) {
    if (evictable(g) > 0) {
      // Evicting may also empty other groups' pages, never lock any.
      while (lru_[static_cast<size_t>(g)].oldest != nullptr) Evict(g, pool(g).num_free() + 1);
    }
  }
}

void RadixTree::Detach(TreeNode* node) {
  SAPWOOD_CHECK(node->attached && node->parent != nullptr, "detach");
  scratch_.assign(1, node);
  for (size_t i = 0; i < scratch_.size(); ++i) {
    for (TreeNode* child = scratch_[i]->first_child; child != nullptr; child = child->next_sibling) {
      scratch_.push_back(child);
    }
  }
  // Children before parents: events and hashes of a page name the page before it.
  for (size_t i = scratch_.size(); i-- > 0;) {
    TreeNode* gone = scratch_[i];
    for (int g = 0; g < num_groups_; ++g) {
      TreeNode::Group& group = gone->groups[static_cast<size_t>(g)];
      if (gone->num_valid(g) == 0) continue;
      if (group.locks == 0) Remove(gone, g);
      for (int32_t index = gone->num_pages - 1; index >= group.first_valid; --index) {
        if (group.locks == 0) {
          FreePage(gone, g, index, PageState::kCached);
        } else {
          pool(g).Move(group.pages[static_cast<size_t>(index)], PageState::kCached, PageState::kLimbo);
          Emit(CacheEvent::Kind::kRemoved, gone, g, index);
        }
      }
      if (group.locks == 0) group.first_valid = gone->num_pages;
    }
    UnlinkChild(gone);
    if (gone->pins == 0) FreeNode(gone);
  }
}

void RadixTree::DetachSince(int64_t step) {
  std::vector<TreeNode*> topmost, open;
  for (const auto& [ns, root] : roots_) open.push_back(root);
  while (!open.empty()) {
    TreeNode* node = open.back();
    open.pop_back();
    for (TreeNode* child = node->first_child; child != nullptr; child = child->next_sibling) {
      (child->ready_step >= step ? topmost : open).push_back(child);
    }
  }
  for (TreeNode* node : topmost) {
    TreeNode* parent = node->parent;
    Detach(node);
    DeleteIfUseless(parent);
  }
}

// ---- For humans ----

std::string RadixTree::DebugString() const {
  std::string out;
  const auto print = [&](const auto& self, const TreeNode* node, int depth) -> void {
    if (node->parent != nullptr) {
      out.append(static_cast<size_t>(depth) * 2, ' ');
      for (const int32_t key : node->keys) out += StrCat(key, " ");
      for (const TreeNode::Group& group : node->groups) {
        out += "[";
        for (size_t i = 0; i < group.pages.size(); ++i) {
          out += StrCat(i == 0 ? "" : " ", group.pages[i] == kNoPage ? "-" : StrCat(group.pages[i]));
        }
        out += "] ";
      }
      for (size_t g = 0; g < node->groups.size(); ++g) out += StrCat(g == 0 ? "" : ",", node->groups[g].locks);
      out += "\n";
    }
    std::vector<const TreeNode*> children;
    for (const TreeNode* child = node->first_child; child != nullptr; child = child->next_sibling) {
      children.push_back(child);
    }
    std::sort(children.begin(), children.end(), [](const auto* a, const auto* b) { return a->keys < b->keys; });
    for (const TreeNode* child : children) self(self, child, depth + 1);
  };
  const std::map<uint64_t, TreeNode*> sorted(roots_.begin(), roots_.end());
  for (const auto& [ns, root] : sorted) {
    out += StrCat("namespace ", ns, "\n");
    print(print, root, 0);
  }
  return out;
}

}  // namespace sapwood
