// The radix tree over (namespace, key ids) that holds the computed pages of every group.
//
// On the request path: the cache manager matches a new request's keys here, locks what matched for the lease, inserts
// the lease's pages as they are computed and unlocks when the step that names them has retired; when pages run
// short the manager asks the tree to evict.
//
// Structure. Edges are page-granular: a node holds num_pages * page_size keys and, for every group, one page
// per page of keys. There is one root per namespace (no keys, no pages). A child is found by one hash
// table of the whole tree, keyed by the parent and the first page of the child's keys; siblings are linked
// besides, for walking a subtree. In a window group a node may have lost the pages at its front
// ([0, first_valid)): a tombstone, the node stays because its other groups or its descendants need it.
//
// The flat table of CacheKind::kFlat is this structure with one page a node and the hash table keyed by the chained
// hash of the whole prefix (trusted, not compared) instead of (parent, keys): what vLLM's block table does, with the
// same locks, LRU order and limbo, so that an ablation compares the lookup alone.
//
// Locks. A PathLock pins every node from its node to the root and locks, per group, those whose first page lies in
// [from, to): the whole path for full and latent groups, what the row's window still overlaps for window groups.
// Splits keep the lower half as the existing object, so a PathLock's node keeps its meaning, and node
// boundaries never vanish below a lock, so a range [from, to) keeps its meaning too.
//
// Eviction. Per group, unlocked nodes that hold pages are on one LRU list, as the unreferenced entries of
// LevelDB's cache are. Unlocking appends the deepest node first, then its ancestors; splitting puts the upper half
// right after the lower. So a child precedes its parent and the head of a full group's list is a leaf: eviction trims
// the head's last page, with no scan and no heap.
// A window group is the other way round: a continued prefix needs its last pages most, and nothing hangs below a
// window page. Shallow nodes are appended first, the upper half of a split goes before the lower, and eviction
// drops the head's first page.
//
// Thread safety: none. Invariants: those of cache_manager.h; Check() rebuilds them from scratch.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "cache/cache_manager.h"
#include "cache/page_pool.h"

namespace sapwood {

inline constexpr int kMaxGroups = 8;  // keeps PathLock free of heap memory
inline constexpr int32_t kPathEnd = std::numeric_limits<int32_t>::max();

struct TreeNode {
  struct Group {
    std::vector<PageId> pages;  // num_pages entries; kNoPage in [0, first_valid)
    int32_t first_valid = 0;    // 0 but in window groups
    int32_t locks = 0;
    TreeNode* older = nullptr;  // neighbours on the group's LRU list
    TreeNode* newer = nullptr;
  };

  uint64_t id = 0;
  uint64_t ns = 0;
  TreeNode* parent = nullptr;  // null for a root
  TreeNode* first_child = nullptr;
  TreeNode* prev_sibling = nullptr;
  TreeNode* next_sibling = nullptr;
  TreeNode* next_in_bucket = nullptr;
  uint64_t bucket_hash = 0;
  int32_t begin = 0;  // absolute index of the first page
  int32_t num_pages = 0;
  int32_t pins = 0;         // path locks that run through this node; a pinned node is never deleted
  bool live = false;        // false: a spare
  bool attached = false;    // false: invalidated, out of the tree, kept for the leases that still read its pages
  uint64_t owner = 0;       // the live lease that computed some page of it, or 0
  int64_t ready_step = kNoStep;  // its pages are computed once this step has run
  std::vector<int32_t> keys;
  std::vector<PageHash> hashes;  // per page; empty unless the tree hashes
  std::vector<Group> groups;

  int32_t end() const { return begin + num_pages; }
  int32_t num_valid(int g) const { return num_pages - groups[static_cast<size_t>(g)].first_valid; }
};

// What one lease or one limbo entry locks; see above.
struct PathLock {
  TreeNode* node = nullptr;
  std::array<int32_t, kMaxGroups> from{};
  std::array<int32_t, kMaxGroups> to{};

  void LockAllGroups() { to.fill(kPathEnd); }
};

// A lease's page tables: absolute page index -> page, per group, all of one length.
struct PageTables {
  std::vector<std::vector<PageId>> pages;
  std::array<int32_t, kMaxGroups> first{};  // entries below are kNoPage, those from here on are pages
};

class RadixTree {
 public:
  struct Found {
    TreeNode* node = nullptr;   // null: nothing cached in this namespace
    int32_t num_in_node = 0;    // pages of it that matched
    int32_t num_pages = 0;      // pages from the root
  };

  // `pools` (one per group) and `events` outlive the tree. config is checked by the caller.
  RadixTree(const CacheConfig& config, std::vector<PagePool>* pools, std::vector<CacheEvent>* events);
  RadixTree(const RadixTree&) = delete;
  RadixTree& operator=(const RadixTree&) = delete;

  // Longest prefix of keys whose pages every group holds as far as it needs them. O(matched tokens).
  Found Match(uint64_t ns, std::span<const int32_t> keys) const;

  // First page that a row of `len` tokens needs in group g: 0, or what the window of the next query begins in.
  int32_t FirstNeeded(int g, int64_t len) const;

  // The namespace's root, made if missing. It disappears with its last child and pin.
  TreeNode* Root(uint64_t ns);

  // The node on the path from `node` to its root that ends at page `end`; splits the one that runs across.
  // REQUIRES: 0 <= end <= node->end().
  TreeNode* CutAt(TreeNode* node, int32_t end);

  // First page of the first node on the path that holds something at or after page `first`; node->end() if none does.
  int32_t FirstOverlap(const TreeNode* node, int32_t first) const;

  // Fills tables with the path's pages: node->end() entries per group, kNoPage below tables->first[g].
  void FillTables(const TreeNode* node, PageTables* tables) const;

  void Lock(const PathLock& lock);
  // Deepest node first (shallowest first in window groups). Deletes what nobody needs any more.
  void Unlock(const PathLock& lock);
  // Pins the path without locking a group (for a limbo entry that takes over a part of a lease's lock).
  void Pin(TreeNode* node);
  // Gives up group g's locks of the path's nodes that begin in [from, to). REQUIRES: the path stays pinned.
  void UnlockRange(TreeNode* node, int g, int32_t from, int32_t to);

  // Puts whole pages of keys (from position 0) below lock->node, which ends where they are to go on, and moves the
  // lock to the node where they end. Pages whose keys are there stay the row's own, but fill a window group's
  // tombstones where the node has no other live owner.
  // REQUIRES: lock->node attached; the tables' entries at and after lock->node->end() are kLeased or kNoPage.
  void Insert(PathLock* lock, std::span<const int32_t> keys, const PageTables& tables, uint64_t owner,
              int64_t ready_step);

  // Takes the subtree at node out of the tree: unlocked pages become free, locked ones kLimbo until the last
  // lock goes; an unpinned node is gone. REQUIRES: node attached, not a root.
  void Detach(TreeNode* node);
  // Detaches every node that holds a page computed by step `step` or a later one. O(nodes).
  void DetachSince(int64_t step);

  // Evicts least recently used pages of group g until the pool has num_free free ones.
  // REQUIRES: num_free() + evictable(g) >= num_free. O(1) per page.
  void Evict(int g, int32_t num_free);
  // Evicts everything unlocked.
  void Flush();

  int32_t evictable(int g) const { return evictable_[static_cast<size_t>(g)]; }
  int64_t num_nodes() const { return num_nodes_; }  // attached, without roots
  // Nodes that Evict has looked at since construction: tests show that it grows with pages evicted, not with the tree.
  int64_t TEST_num_evict_visits() const { return num_evict_visits_; }

  std::string DebugString() const;
  // Throws InternalError naming the first broken invariant. locks: every PathLock there is. Marks the pages that
  // nodes hold in seen[group][page], which must be unmarked before. O(pages + nodes). radix_tree_check.cc.
  void Check(std::span<const PathLock* const> locks, std::vector<std::vector<bool>>* seen) const;

 private:
  struct LruList {
    TreeNode* oldest = nullptr;
    TreeNode* newest = nullptr;
  };

  bool is_window(int g) const { return windows_[static_cast<size_t>(g)] > 0; }
  PagePool& pool(int g) { return (*pools_)[static_cast<size_t>(g)]; }

  // Nodes.
  TreeNode* NewNode(uint64_t ns, TreeNode* parent, int32_t begin);
  void FreeNode(TreeNode* node);
  void LinkChild(TreeNode* node);
  void UnlinkChild(TreeNode* node);
  TreeNode* Split(TreeNode* node, int32_t num_upper);
  void AppendPages(TreeNode* node, const int32_t* keys, int32_t count, const PageTables& tables);
  void Refill(TreeNode* node, const PageTables& tables, uint64_t owner, int64_t ready_step);
  bool CanGrow(const PathLock& lock, uint64_t owner) const;
  void Descend(PathLock* lock, TreeNode* child, const PageTables& tables);

  // The hash table of children.
  PageHash ChainHash(const TreeNode* node) const;
  uint64_t BucketHash(const TreeNode* parent, const int32_t* keys, PageHash* chained) const;
  TreeNode* FindChild(const TreeNode* parent, const int32_t* keys) const;
  void InsertBucket(TreeNode* node);
  void EraseBucket(TreeNode* node);
  void GrowBuckets();

  // Locks, LRU.
  void LockGroup(TreeNode* node, int g);
  void UnlockGroup(TreeNode* node, int g);
  void Unpin(TreeNode* node);
  void Append(TreeNode* node, int g);
  void InsertUpper(TreeNode* lower, TreeNode* upper, int g);
  void Remove(TreeNode* node, int g);

  // Eviction.
  void FreePage(TreeNode* node, int g, int32_t index, PageState from);
  void TrimTail(TreeNode* node);
  void DropFront(TreeNode* node, int g);
  bool IsUseless(const TreeNode* node) const;
  void DeleteIfUseless(TreeNode* node);
  void Emit(CacheEvent::Kind kind, const TreeNode* node, int g, int32_t index);

  void CheckNode(const TreeNode& node, std::vector<std::vector<bool>>* seen) const;
  void CheckLists() const;

  const int32_t page_size_;
  const int num_groups_;
  const bool flat_;
  const bool record_events_;
  std::vector<int32_t> windows_;  // per group; 0 for full and latent groups
  int32_t max_node_pages_;
  std::vector<PagePool>* pools_;
  std::vector<CacheEvent>* events_;

  std::deque<TreeNode> nodes_;  // stable addresses; the dead ones are in spare_
  std::vector<TreeNode*> spare_;
  std::unordered_map<uint64_t, TreeNode*> roots_;
  std::vector<TreeNode*> buckets_;  // a power of two
  std::vector<LruList> lru_;        // per group
  std::vector<int32_t> evictable_;  // per group: pages on the list
  std::vector<TreeNode*> scratch_;
  uint64_t last_node_id_ = 0;
  int64_t num_nodes_ = 0;
  int64_t num_evict_visits_ = 0;
};

}  // namespace sapwood
